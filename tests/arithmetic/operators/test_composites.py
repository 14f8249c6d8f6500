"""Tests of operators/composites.py and operators/recurrent.py: one definition, whatever the layout.

The oracle of a product is a sum of fractions. The other composites are compared with PyTorch's own way to
take them apart on contiguous operands, whose operators are tested one by one (test_decompositions.py
records it), and must return the same bits for all other layouts, with and without gradients.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import reproml
from reproml.arithmetic import operator_table
from reproml.arithmetic.operators import composites
from tests.arithmetic.forms import KINDS, numbers
from verification.oracle import Real, check, real, reals, rounded, same_bits

LAYOUTS = ["contiguous", "transposed", "inner", "sliced", "offset"]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return a leaf with the same numbers in another layout."""
    x = x.detach()
    if layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x
    if layout == "inner" and x.dim() > 2:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        x = torch.stack([x, x], -1)[..., 0]
    if layout == "offset":
        x = torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape)
    return x


def outcome(
    call: Callable[..., Any], operands: list[Tensor], gradients: bool = True
) -> list[Tensor]:
    """Return the results of a call and, in this order, the gradients of its operands."""
    operands = [x.requires_grad_(gradients) for x in operands]
    with reproml.exact():
        torch.manual_seed(3)
        results = [t for t in tree_flatten(call(*operands))[0] if isinstance(t, Tensor)]
        if not gradients:
            return results
        loss: Any = sum(
            (t * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum() for t in results
        )
        found = torch.autograd.grad(loss, operands, allow_unused=True)
    return [*(t.detach() for t in results), *(t for t in found if t is not None)]


def normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def layer(module: nn.Module, *shapes: tuple[int, ...], packed: Any = None) -> Any:
    """Return (call, shapes): a module as a function of its operands and its parameters."""
    names = list(dict(module.named_parameters()))
    shapes = (*shapes, *(p.shape for p in module.parameters()))

    def call(*operands: Tensor) -> Any:
        given, parameters = operands[: -len(names)], operands[-len(names) :]
        x: Any = given[0]
        if packed:
            x = torch.nn.utils.rnn.pack_padded_sequence(x, packed)
        cell = isinstance(module, nn.LSTMCell)
        rest = (given[1:],) if cell else given[1:]
        return torch.func.functional_call(module, dict(zip(names, parameters)), (x, *rest))

    return call, shapes


QKV = ((2, 3, 4, 16), (2, 3, 6, 16), (2, 3, 6, 8))
CLASSES = torch.tensor([0, 1, 2, 4])
MASK = torch.ones(4, 6, dtype=torch.bool).tril()

# Name of the composite -> calls and the shapes of their operands.
CALLS: dict[str, Any] = {
    "linear": [
        (F.linear, (x, (5, 300), *bias))
        for x in ((300,), (7, 300), (4, 6, 300), (2, 3, 4, 300))
        for bias in ([], [(5,)])
    ]
    + [(F.linear, ((3, 4, 9), (9,)))],
    "matmul": [
        (torch.matmul, shapes)
        for shapes in [
            ((64,), (64,)), ((64,), (64, 5)), ((7, 64), (64,)), ((3, 7, 64), (64,)),
            ((64,), (3, 64, 5)), ((7, 64), (64, 5)), ((3, 7, 64), (64, 5)), ((7, 64), (3, 64, 5)),
            ((3, 7, 64), (3, 64, 5)), ((2, 3, 7, 64), (3, 64, 5)), ((2, 3, 7, 64), (2, 1, 64, 5)),
        ]
    ],
    "conv_tbc": [(torch.conv_tbc, ((9, 2, 8), (3, 8, 5), (5,)))],
    "linalg_det": [(torch.linalg.det, ((2, 3, 3),))],
    "linalg_slogdet": [(lambda x: torch.linalg.slogdet(x)[1], ((2, 3, 3),))],
    "linalg_solve_ex": [
        (lambda a, b: torch.linalg.solve_ex(a, b)[0], shapes)
        for shapes in [((2, 4, 4), (2, 4, 3)), ((4, 4), (4,))]
    ],
    "einsum": [
        (lambda *x, equation=equation: torch.einsum(equation, *x), shapes)
        for equation, *shapes in [
            ("bqhd,bkhd->bqkh", (2, 5, 3, 8), (2, 6, 3, 8)), ("ij,jk", (4, 50), (50, 3)),
            ("i,j->ij", (4,), (5,)), ("...ij,jk->...ik", (2, 3, 4, 30), (30, 5)),
            ("bij,bkj->bik", (2, 4, 30), (2, 5, 30)), ("ij,ij->ij", (3, 4), (3, 4)),
            ("ij,jk,kl->il", (3, 20), (20, 21), (21, 4)), ("ij->ji", (3, 4)), ("ij->", (3, 40)),
        ]
    ],
    "scaled_dot_product_attention": [
        (F.scaled_dot_product_attention, QKV),
        (partial(F.scaled_dot_product_attention, is_causal=True, dropout_p=0.3), QKV),
        (partial(F.scaled_dot_product_attention, attn_mask=MASK), QKV),
        (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, scale=-0.3), (*QKV, (4, 6))),
        (partial(F.scaled_dot_product_attention, enable_gqa=True),
         ((2, 6, 4, 16), (2, 3, 5, 16), (2, 3, 5, 16))),
        layer(nn.MultiheadAttention(16, 4, dropout=0.2), (5, 3, 16), (6, 3, 16), (6, 3, 16)),
    ],
    "cross_entropy_loss": [
        (lambda x, w, kw=kw: F.cross_entropy(x, CLASSES, w.detach(), ignore_index=1, **kw), ((4, 5), (5,)))
        for kw in [{}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "reduction": "none"}]
    ]
    + [
        (lambda x: F.cross_entropy(x, CLASSES, label_smoothing=0.2), ((4, 5),)),
        (lambda x: F.cross_entropy(x, CLASSES[:, None] % 4, reduction="sum"), ((4, 5, 1),)),
        (lambda x: F.cross_entropy(x, CLASSES[2]), ((5,),)),
        (lambda x, p, w: F.cross_entropy(x, p.softmax(1), w.detach(), label_smoothing=0.1),
         ((4, 5), (4, 5), (5,))),
        (lambda x, p: F.cross_entropy(x, p.softmax(1), reduction="none"), ((4, 5), (4, 5))),
    ],
    "cosine_similarity": [
        (F.cosine_similarity, ((4, 30), (4, 30))),
        (lambda x, y: F.cosine_similarity(x[:, None], y[None], dim=-1), ((4, 30), (3, 30))),
    ],
    "pairwise_distance": [
        (F.pairwise_distance, ((4, 30), (4, 30))),
        (lambda x, y: F.pairwise_distance(x, y, 1.0, keepdim=True), ((4, 30), (4, 30))),
    ],
    "prod": [(torch.prod, ((4, 6),)), (lambda x: torch.prod(torch.where(x > 0, x, 0)), ((2, 2),))],
    "prod.dim_int": [(lambda x: x.prod(1, keepdim=True), ((4, 6, 2),)), (lambda x: x.prod(-1), ((4, 6),))],
    "cumprod": [(lambda x: x.cumprod(1), ((4, 6, 2),))],
    "atan2": [(torch.atan2, ((4, 6), (4, 6))), (torch.atan2, ((4, 1), (6,)))],
    "atan2_": [(lambda y, x: (y * 1).atan2_(x), ((4, 6), (6,)))],
    "lstm.input": [
        layer(nn.LSTM(20, 7), (4, 3, 20)),
        layer(nn.LSTM(20, 7, batch_first=True, bias=False), (4, 3, 20)),
        layer(nn.LSTM(20, 7, 2, dropout=0.4, bidirectional=True, proj_size=3), (4, 3, 20)),
    ],
    "lstm.data": [
        layer(nn.LSTM(20, 7), (4, 4, 20), packed=[4, 2, 2, 1]),
        layer(nn.LSTM(20, 7, 2, dropout=0.4, bidirectional=True, proj_size=3), (4, 4, 20),
              packed=[4, 2, 2, 1]),
    ],
    "gru.input": [layer(nn.GRU(20, 7), (4, 3, 20), (1, 3, 7)),
                  layer(nn.GRU(20, 7, 2, bidirectional=True, batch_first=True), (4, 3, 20))],
    "gru.data": [layer(nn.GRU(20, 7, bidirectional=True), (4, 4, 20), packed=[4, 2, 2, 1])],
    "rnn_tanh.input": [layer(nn.RNN(20, 7, 2, bias=False), (4, 3, 20))],
    "rnn_tanh.data": [layer(nn.RNN(20, 7), (4, 4, 20), packed=[4, 2, 2, 1])],
    "rnn_relu.input": [layer(nn.RNN(20, 7, nonlinearity="relu"), (4, 3, 20))],
    "rnn_relu.data": [layer(nn.RNN(20, 7, nonlinearity="relu"), (4, 4, 20), packed=[4, 4, 1, 1])],
    "lstm_cell": [layer(nn.LSTMCell(20, 7), (3, 20), (3, 7), (3, 7))],
    "gru_cell": [layer(nn.GRUCell(20, 7), (3, 20), (3, 7))],
    "rnn_tanh_cell": [layer(nn.RNNCell(20, 7, bias=False), (3, 20))],
    "rnn_relu_cell": [layer(nn.RNNCell(20, 7, nonlinearity="relu"), (3, 20), (3, 7))],
}  # fmt: skip

# Rounded once here, and twice where PyTorch takes the composite apart: a layer whose batch comes first.
# The gradients of products are defined here, as PyTorch has several.
ROUNDED_ONCE_ONLY_HERE = {("gru.input", 1), ("cumprod", 0)} | {
    (name, i) for name in ("prod", "prod.dim_int") for i in (0, 1)
}


def test_every_composite_is_tested():
    assert set(CALLS) == set(operator_table.COMPOSITES)


@pytest.mark.parametrize("name", CALLS)
def test_composite_does_not_depend_on_layout(name):
    """Nor on whether gradients are wanted, or on inference mode."""
    for call, shapes in CALLS[name]:
        operands = normal(*shapes)
        expected = outcome(call, [x.clone() for x in operands])
        for layout in LAYOUTS:
            for chosen in (range(len(operands)), [0]):
                given = [
                    laid_out(x, layout if i in chosen else "contiguous").clone(
                        memory_format=torch.preserve_format
                    )
                    if layout == "contiguous"
                    else laid_out(x, layout if i in chosen else "contiguous")
                    for i, x in enumerate(operands)
                ]
                found = outcome(call, given)
                assert len(found) == len(expected) and all(map(same_bits, found, expected)), layout
                for context in (torch.no_grad, torch.inference_mode):
                    with context():
                        results = outcome(call, given, gradients=False)
                    assert all(map(same_bits, results, expected))


# PyTorch has kernels for these, and takes none of them apart.
KERNELS = {"conv_tbc", "linalg_det", "linalg_slogdet", "linalg_solve_ex"}


@pytest.mark.parametrize("name", sorted(CALLS.keys() - KERNELS))
def test_composite_is_what_pytorch_takes_apart(name, monkeypatch):
    """On contiguous operands, so that nobody's model changes where PyTorch has one way."""
    for i, (call, shapes) in enumerate(CALLS[name]):
        operands = normal(*shapes)
        found = outcome(call, [x.clone() for x in operands])
        with monkeypatch.context() as m:
            m.setattr(operator_table, "COMPOSITES", {})
            apart = outcome(call, [x.clone() for x in operands])
        same = list(map(same_bits, found, apart))
        assert all(same) or (name, i) in ROUNDED_ONCE_ONLY_HERE, (i, same)


def test_gradient_of_an_angle_at_the_origin_is_zero():
    nan = float("nan")
    y = torch.tensor([0.0, -0.0, 0.0, 1e-30, 2.0, nan, 1.0], requires_grad=True)
    x = torch.tensor([0.0, 0.0, -0.0, 1e-30, 2.0, 1.0, nan], requires_grad=True)
    with reproml.exact():
        of_y, of_x = torch.autograd.grad(torch.atan2(y, x).sum(), (y, x))
    assert of_y[:5].tolist() == [0, 0, -0.0, 0, 0.25] and of_x[:5].tolist() == [0, 0, 0, 0, -0.25]
    assert of_y[5:].isnan().all() and of_x[5:].isnan().all()


def test_composites_run_in_native_threads(monkeypatch):
    """Also those that PyTorch does not take apart, while another thread is within exact()."""
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    found: list[Any] = []
    start = threading.Event()

    def work() -> None:
        start.wait()
        for function in (
            torch.prod,
            lambda x: x.cumprod(0),
            lambda x: torch.atan2(x, x),
            lambda x: torch.fmax(x, x),
        ):
            found.append(torch.autograd.grad(function(x).sum(), x))

    thread = threading.Thread(target=work)
    thread.start()  # before exact(), so not within it
    with reproml.exact():
        start.set()
        thread.join()
    assert len(found) == 4


class Unchanged(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_gradients_of_products_are_the_defined_ones(zeros):
    x, g = normal((5,), (5,))
    x[1 : 1 + zeros] = 0
    values, gs = reals(x), reals(g)

    def product(row: Any) -> Any:
        result = Real(1)
        for v in row:
            result = result * v
        return result

    before = [rounded(product(values[:i])) for i in range(5)]
    after = [rounded(product(values[i + 1 :])) for i in range(5)]
    of_prod = [gs[0] * rounded(a * b) for a, b in zip(before, after)]
    sums = [gs[4]]
    for i in (3, 2, 1, 0):
        sums.insert(0, rounded(gs[i] + values[i + 1] * sums[0]))
    of_cumprod = [a * b for a, b in zip(before, sums)]
    terms = [rounded(t * rounded(a * b)) for t, a, b in zip(gs, before, after)]
    forward = [rounded(t * a) for t, a in zip(gs, before)]
    for i in range(1, 5):
        forward[i] = rounded(forward[i] + values[i] * forward[i - 1])
    for mode in (nullcontext, Unchanged):
        with reproml.exact(), mode():
            y = x.clone().requires_grad_()
            (found,) = torch.autograd.grad(y.prod(), y, g[0])
            check(found, of_prod, any_zero=True)
            (found,) = torch.autograd.grad(y.cumprod(0), y, g)
            check(found, of_cumprod, any_zero=True)
            _, found = torch.func.jvp(torch.prod, (x,), (g,))
            check(found.reshape(1), [sum(terms[1:], terms[0])], any_zero=True)
            _, found = torch.func.jvp(lambda x: x.cumprod(0), (x,), (g,))
            check(found, forward, any_zero=True)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_cumulative_products_has_the_bits_of_its_steps(kind):
    """A loop runs the steps where nothing else has to see them, as a TorchDispatchMode does."""
    x, g = numbers((40, 6), kind), numbers((40, 6), kind, 1)
    x[3], x[20, :2], g[5] = 0.0, -0.0, -0.0
    x[30, 0], g[30, 1], x[30, 2] = math.inf, math.nan, 2.0**-140
    for operands in ((x, g), (x[:, :1], g[:, :1]), (x.view(5, 8, 6), g.view(5, 8, 6))):
        for dim in (0, 1):
            leaf, of_result = operands[0].clone().requires_grad_(), operands[1]
            with reproml.exact():
                (found,) = torch.autograd.grad(leaf.cumprod(dim), leaf, of_result)
                with Unchanged():
                    (expected,) = torch.autograd.grad(leaf.cumprod(dim), leaf, of_result)
            assert same_bits(found, expected)
            assert found.stride() == expected.stride()


def test_forward_derivative_of_an_angle_is_the_sum_of_its_gradients():
    y, x, of_y, of_x = normal((4, 6), (6,), (4, 6), (6,))
    for mode in (nullcontext, Unchanged):
        with reproml.exact(), mode(), forward_ad.dual_level():
            duals = forward_ad.make_dual(y, of_y), forward_ad.make_dual(x, of_x)
            found = forward_ad.unpack_dual(torch.atan2(*duals)).tangent
            r = (y * y + x * x).reciprocal()
            assert same_bits(found, of_y * x * r + of_x * -y * r)
            found = forward_ad.unpack_dual(torch.atan2(y, duals[1])).tangent
            assert same_bits(found, 0 * x * r + of_x * -y * r)


def test_gradients_of_products_are_those_of_torch_func():
    (x,) = normal((3, 5))

    def squares(row: Tensor) -> Tensor:
        return row.cumprod(0).square().sum() * row.prod()

    with reproml.exact():
        rows = [torch.autograd.grad(squares(y), y)[0] for y in x.clone().requires_grad_()]
        assert same_bits(torch.func.vmap(torch.func.grad(squares))(x), torch.stack(rows))


def test_linear_on_strided_input_is_rounded_once():
    """31 of these 120 elements were rounded twice."""
    x, weight, bias = normal((4, 6, 300), (5, 300), (5,))
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    with reproml.exact():
        found = F.linear(strided, weight, bias)
    a, w, b = (t.double().numpy() for t in (x, weight, bias))
    expected = np.empty((4, 6, 5), dtype=object)
    for i in np.ndindex(*expected.shape):
        terms = [Fraction(p) * Fraction(q) for p, q in zip(a[i[:2]], w[i[2]])]
        expected[i] = Real(sum(terms, Fraction(b[i[2]])))
    check(found, expected)


@pytest.mark.parametrize(
    "shapes", [((2, 1, 3, 4), (5, 4, 2)), ((3, 4), (5, 4, 2)), ((5, 3, 4), (4, 2))]
)
def test_matmul_is_rounded_once(shapes):
    a, b = normal(*shapes)
    with reproml.exact():
        found = torch.matmul(a, b)
    check(found, np.vectorize(real)(np.matmul(reals(a), reals(b))))


@pytest.mark.parametrize("equation, shapes", [
    ("ab,bc->ac", ((3, 4), (4, 5))), ("abc,cd->dab", ((2, 3, 4), (4, 5))),
    ("a,b->ab", ((3,), (4,))), ("ab,ab->a", ((3, 4), (3, 4))), ("aab,b->a", ((3, 3, 4), (4,))),
    ("...a,...a->...", ((2, 3, 4), (2, 3, 4))), ("...a,a...", ((2, 3), (3, 2))),
    ("a...b,b->...a", ((2, 3, 1, 4), (4,))), ("aa->a", ((3, 3),)),
    ("ba", ((2, 3),)), ("...ab->...", ((2, 3, 4),)), ("ab,cb->ca", ((2, 1), (3, 4))),
])  # fmt: skip
def test_einsum_is_rounded_once(equation, shapes):
    operands = normal(*shapes)
    with reproml.exact():
        found = torch.einsum(equation, *operands)
    wide = [x.double() for x in operands]
    assert found.shape == torch.einsum(equation, *wide).shape
    letters = iter("zyxw")
    hidden = (
        max(
            x.dim() - len(term.strip().replace("...", ""))
            for x, term in zip(operands, equation.partition("->")[0].split(","))
            if "..." in term
        )
        if "..." in equation
        else 0
    )
    dots = "".join(next(letters) for _ in range(hidden))
    spelled = equation.replace("...", dots)
    if "->" not in spelled:  # NumPy sorts by letter, PyTorch puts what "..." stands for first
        once = sorted(c for c in set(spelled) - {","} if spelled.count(c) == 1 and c not in dots)
        spelled += "->" + dots + "".join(once)
    check(found, np.asarray(by_fractions(spelled, operands), dtype=object))


def by_fractions(equation: str, operands: list[Tensor]) -> Any:
    """Evaluate an einsum by its definition: a sum of products over all indices."""
    terms, _, output = equation.partition("->")
    sizes: dict[str, int] = {}
    for term, x in zip(terms.split(","), operands):
        for letter, n in zip(term, x.shape):
            sizes[letter] = max(n, sizes.get(letter, 1))
    out = np.zeros([sizes[c] for c in output], dtype=object)
    arrays = [x.double().numpy() for x in operands]
    for index in np.ndindex(*sizes.values()):
        at = dict(zip(sizes, index))
        product = math.prod(
            Fraction(a[tuple(at[c] if n > 1 else 0 for c, n in zip(term, a.shape))])
            for term, a in zip(terms.split(","), arrays)
        )
        out[tuple(at[c] for c in output)] += product
    return np.vectorize(Real, otypes=[object])(out)


def test_gradient_of_einsum_diagonal_is_written_to_the_diagonal():
    x = torch.randn(3, 3, requires_grad=True)
    g = torch.randn(3)
    with reproml.exact():
        torch.einsum("ii->i", x).backward(g)
    assert x.grad is not None and torch.equal(x.grad, torch.diag(g))


def test_einsum_sums_what_one_operand_has_first():
    a, b = normal((30, 40), (40,))
    with reproml.exact():
        found = torch.einsum("ab,b->", a, b)
        assert same_bits(found, torch.dot(a.sum(0), b))


@pytest.mark.parametrize("equation, shapes", [
    ("ab,bc", ((2, 3), (4, 5))), ("a1", ((2, 3),)), ("ab", ((2,),)), ("a,b", ((2,),)),
    ("ab->aa", ((2, 3),)), ("ab->c", ((2, 3),)), ("a...", ((),)), ("aa->a", ((1, 3),)),
])  # fmt: skip
def test_invalid_einsum_is_an_error(equation, shapes):
    with pytest.raises(RuntimeError, match=r"einsum\(\)"), reproml.exact():
        torch.einsum(equation, *normal(*shapes))


def test_einsum_does_not_use_a_path():
    """PyTorch chooses one if opt_einsum is installed."""
    operands = normal((3, 40), (40, 50), (50, 2))
    with reproml.exact():
        expected = composites.einsum("ab,bc,cd->ad", operands)
        for path in ([0, 1, 0, 1], [1, 2, 0, 1]):
            assert same_bits(torch.ops.aten.einsum("ab,bc,cd->ad", operands, path=path), expected)


def test_gradient_of_shared_weight_is_one_sum():
    """The gradient of a weight beside a batch of matrices sums over all rows, in each layout."""
    x, weight = normal((4, 6, 30), (30, 5))
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        weight = weight.detach().requires_grad_()
        with reproml.exact():
            torch.matmul(given, weight).backward(torch.ones(4, 6, 5))
        columns = x.double().sum(
            (0, 1)
        )  # of fewer than 30 numbers, so a tie is out of the question
        gradient: Any = weight.grad
        assert same_bits(gradient, columns.float()[:, None].expand(30, 5).contiguous())


def test_other_threads_run_pytorchs_own_composites():
    """Those that are not within exact(), and code that runs natively within it."""
    x, weight = normal((3, 40), (5, 40))
    expected = F.linear(x.double(), weight.double())
    with reproml.exact(), reproml.arithmetic.dispatch.dispatcher.natively():
        assert torch.equal(F.linear(x.double(), weight.double()), expected)


def test_shapes_that_do_not_fit_are_errors():
    for call, shapes in (
        (torch.matmul, ((), (3,))),
        (torch.matmul, ((2, 3), (4, 5))),
        (torch.matmul, ((2, 3, 4), (3, 4, 5))),
        (F.linear, ((2, 3), (5, 4))),
    ):
        with pytest.raises(RuntimeError), reproml.exact():
            call(*normal(*shapes))
    q = torch.ones(1, 2, 4)
    with pytest.raises(RuntimeError), reproml.exact():
        F.scaled_dot_product_attention(q, q, q, torch.ones(2, 2), is_causal=True)
    with pytest.raises(RuntimeError), reproml.exact():
        torch.nn.LSTM(3, 4)(torch.ones(0, 2, 3))


@pytest.mark.parametrize("cell", [nn.RNNCell(4, 3), nn.GRUCell(4, 3)])
def test_cells_run_within_vmap(cell):
    (x,) = normal((6, 2, 4))
    with reproml.exact():
        found = torch.vmap(cell)(x)
        expected = torch.stack([cell(v) for v in x])
    torch.testing.assert_close(found, expected)


def test_linear_within_vmap_is_rounded_once():
    x, weight, bias = normal((6, 4, 30), (5, 30), (5,))
    with reproml.exact():
        expected = F.linear(x, weight, bias)
        assert same_bits(torch.vmap(F.linear, (0, None, None))(x, weight, bias), expected)
        assert same_bits(
            torch.vmap(lambda v: F.linear(v, weight, bias[0]))(x), F.linear(x, weight, bias[0])
        )
        each = torch.vmap(F.linear)(x, weight.expand(6, 5, 30), bias.expand(6, 5))
        assert same_bits(each, expected)


X, HEADS = torch.ones(3, 4), torch.ones(2, 2, 5, 8)
GRU = [torch.ones(15, 4), torch.ones(15, 5), torch.ones(15), torch.ones(15)]


@pytest.mark.parametrize("call", [
    lambda: F.linear(X, torch.ones(4), torch.tensor(1.0)),
    lambda: F.linear(torch.tensor(1.0), torch.ones(3, 4)),
    lambda: F.scaled_dot_product_attention(HEADS, HEADS, HEADS, torch.ones(5, 5).long()),
    lambda: F.scaled_dot_product_attention(HEADS[:, :1], HEADS, HEADS, enable_gqa=True),
    lambda: F.scaled_dot_product_attention(X[0], X[0], X[0]),
    lambda: F.cross_entropy(X, torch.zeros(3).int()),
    lambda: F.cross_entropy(X, X, ignore_index=1),
    lambda: F.cross_entropy(X, torch.zeros(3).long(), label_smoothing=2.0),
    lambda: F.cross_entropy(torch.tensor(1.0), torch.tensor(0)),
    lambda: F.cosine_similarity(X.long(), X.long()),
    lambda: nn.GRUCell(4, 3)(torch.ones(1, 4), torch.ones(3, 3)),
    lambda: nn.LSTMCell(4, 3)(torch.ones(2, 4), (torch.ones(2, 3), torch.ones(3, 3))),
    lambda: torch.gru(HEADS[0, :, :3, :4], torch.ones(1, 3, 5), GRU[:2], True, 1, 0.0, False, False, False),
    lambda: torch.gru(HEADS[0, :, :3, :4], torch.ones(2, 3, 5), GRU, True, 1, 0.0, False, False, False),
])  # fmt: skip
def test_what_pytorch_refuses_is_refused(call):
    for context in (nullcontext, reproml.exact):
        with context(), pytest.raises(RuntimeError):
            call()


@pytest.mark.parametrize("call", [
    lambda: F.scaled_dot_product_attention(X[:, :0], X[:, :0], X),
    lambda: F.cross_entropy(X, torch.zeros(3, dtype=torch.uint8)),
    lambda: F.cross_entropy(X[:, :0], X[:, :0]),
    lambda: torch.einsum("i,j->ij", torch.tensor([True, False]), torch.tensor([True])),
    lambda: torch.einsum("i,j->ij", torch.tensor([-1.0]), torch.tensor([0.0])),  # -0.0
    lambda: torch.einsum("ij,jk->ik", X.long(), X.long().t()),
    lambda: F.cross_entropy(X, torch.zeros(3).long(), label_smoothing=-0.5),
])  # fmt: skip
def test_what_pytorch_takes_is_taken(call):
    native = call()
    with reproml.exact():
        found = call()
    assert found.dtype == native.dtype and found.shape == native.shape
    assert torch.equal(found.isnan(), native.isnan())
    torch.testing.assert_close(found.nan_to_num(), native.nan_to_num())
    if native.is_floating_point():
        assert torch.equal(found.signbit(), native.signbit()) or native.isnan().any()


@pytest.mark.parametrize("name", [name for name in CALLS if not name.endswith(".data")])
def test_composite_is_ours_within_torch_func(name):
    """PyTorch's transforms see an operator before autograd does; they take no packed sequences."""

    def vjp(function: Any) -> Any:
        return lambda *x: torch.func.vjp(function, *x)[0]

    for call, shapes in CALLS[name]:
        operands = normal(*shapes)
        given = [laid_out(x, "transposed") for x in operands]
        # Functions of autograd, which functionalize does not take.
        of_autograd = name.startswith(("prod", "cumprod", "atan2", "linalg"))
        for transform in (vjp,) if of_autograd else (vjp, torch.func.functionalize):
            expected = outcome(call, [x.clone() for x in operands], gradients=False)
            found = outcome(transform(call), [x.detach() for x in given], gradients=False)
            assert all(map(same_bits, found, expected))
