"""Steps of recurrent layers as nodes of autograd: what operators/recurrent.py defines, computed in C.

An expression of operators becomes as many nodes of autograd, and calls PyTorch for each of them. Here the
elementwise part of a step is one node, and so are the steps of a layer, with the products of the hidden
state. The operators and their order are those of the expression, so every result and gradient has the same
bits (tests/arithmetic/operators/test_recurrent.py):

- A step for which a rounding test fails in csrc/recurrent.c is computed by the operators.
- A gradient with create_graph=True is computed by operators too. They take the values that the nodes
  return beside the new state, so that a second derivative reaches each value once.
- A weight is an operand once for each step, as autograd adds the gradients of the steps to what it has.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn import Parameter

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.dispatch import dispatcher
from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.torch_internals import get_interpreter_stack

# Numbers in the gradients of a weight that a node keeps until autograd has added them up.
_MOST_GRADIENTS = 1 << 21

Maybe = Optional[Tensor]


class Values(NamedTuple):
    """What a step computes. c: the new c of an LSTM, or h - n of a GRU; see csrc/recurrent.c."""

    h: Any
    c: Any = None
    gates: Any = None
    kept: Any = None


class Gradients(NamedTuple):
    """Gradients of the operands of a step: those of its products, and of the state beside them."""

    x: Tensor
    z: Tensor
    state: Any = None  # c of an LSTM, h of a GRU


class Cell(NamedTuple):
    """A cell as this module takes it."""

    number: int  # in csrc/recurrent.c
    gates: int
    # (product of the input, of the hidden state, h, c) -> values
    values: Callable[[Tensor, Tensor, Tensor, Maybe], Values]
    # (values, c before, their gradients) -> gradients
    gradients: Callable[[Values, Any, Values], Gradients]

    @property
    def is_lstm(self) -> bool:
        return self.gates == 4

    @property
    def has_gates(self) -> bool:
        return self.gates > 1


# ---- gradients, by the operators of autograd and in its order ----------------------------------------


def _plus(a: Maybe, b: Maybe) -> Maybe:
    return b if a is None else a if b is None else a + b


def _times(g: Maybe, x: Tensor) -> Maybe:
    return None if g is None else g * x


def _through(derivative: Any, g: Maybe, y: Tensor) -> Maybe:
    return None if g is None else derivative(g, y)


def _chunks(x: Maybe, count: int) -> Sequence[Any]:
    return [None] * count if x is None else x.chunk(count, 1)


def _joined(parts: Sequence[Maybe], like: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(like) if x is None else x for x in parts], 1)


_tanh, _sigmoid = torch.ops.aten.tanh_backward, torch.ops.aten.sigmoid_backward


def lstm_gradients(of: Values, c: Any, g: Values) -> Gradients:
    """g: gradients of the values, or None, as for the other cells."""
    i, f, new, o = _chunks(of.gates, 4)
    of_i, of_f, of_new, of_o = _chunks(g.gates, 4)
    of_kept = _plus(g.kept, _times(g.h, o))
    of_o = _plus(of_o, _times(g.h, of.kept))
    of_c = _plus(g.c, _through(_tanh, of_kept, of.kept))
    of_new, of_i = _plus(of_new, _times(of_c, i)), _plus(of_i, _times(of_c, new))
    state, of_f = _times(of_c, f), _plus(of_f, _times(of_c, c))
    of_o, of_new = _through(_sigmoid, of_o, o), _through(_tanh, of_new, new)
    of_f, of_i = _through(_sigmoid, of_f, f), _through(_sigmoid, of_i, i)
    x = _joined([of_i, of_f, of_new, of_o], of.kept)
    return Gradients(x, x, state)


def gru_gradients(of: Values, c: Any, g: Values) -> Gradients:
    r, z, new = _chunks(of.gates, 3)
    of_r, of_z, of_new = _chunks(g.gates, 3)
    of_new = _plus(of_new, g.h)
    of_z, state = _plus(of_z, _times(g.h, of.c)), _plus(g.c, _times(g.h, z))
    of_new = _plus(of_new, None if state is None else state.neg())
    of_new = _through(_tanh, of_new, new)
    of_r, of_kept = _plus(of_r, _times(of_new, of.kept)), _plus(g.kept, _times(of_new, r))
    of_z, of_r = _through(_sigmoid, of_z, z), _through(_sigmoid, of_r, r)
    parts = [of_r, of_z]
    return Gradients(_joined([*parts, of_new], r), _joined([*parts, of_kept], r), state)


def tanh_gradients(of: Values, c: Any, g: Values) -> Gradients:
    x = _tanh(g.h, of.h)
    return Gradients(x, x)


def relu_gradients(of: Values, c: Any, g: Values) -> Gradients:
    x = torch.ops.aten.threshold_backward(g.h, of.h, 0)
    return Gradients(x, x)


# ---- where C can be called ---------------------------------------------------------------------------

_PLAIN = (Tensor, Parameter)


def are_plain(operands: Sequence[Maybe]) -> bool:
    """Return whether C can read these operands, and nothing else has to see the operators."""
    for x in operands:
        if x is not None and not (
            type(x) in _PLAIN
            and x.dtype is torch.float32
            and x.is_cpu
            and x.layout is torch.strided
            and x.is_contiguous()
            and not x.is_neg()
        ):
            return False
    return not (kernels.binary32_loops() is None or replay_log.active or dispatcher.has_modes())


def _has_node(*operands: Maybe) -> bool:
    """Return whether a node of this module can take the place of the expression."""
    if not are_plain(operands) or get_interpreter_stack() is not None:
        return False
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    return all(x is None or (x.numel() and unpack_dual(x).tangent is None) for x in operands)


def _pointers(*tensors: Maybe) -> Any:
    return (ctypes.c_void_p * len(tensors))(
        *[x.data_ptr() if x is not None else None for x in tensors]
    )


# ---- one step ----------------------------------------------------------------------------------------


def step(cell: Cell, x: Tensor, z: Tensor, h: Tensor, c: Maybe) -> Optional[tuple[Tensor, ...]]:
    """Return the new (h,) or (h, c) of a step; None where the expression has to be evaluated.

    x, z: the products of the input and of the hidden state. For a cell without gates h is not used.
    """
    shape = z.shape[:1] + (z.shape[-1] // cell.gates,)
    if x.shape != z.shape or z.dim() != 2 or (h if c is None else c).shape != shape:
        return None
    state = c if cell.is_lstm else h if cell.has_gates else None
    if not _has_node(x, z, state):
        return None
    new = _Step.apply(cell, x, z, state)
    return tuple(new[:2]) if cell.is_lstm else (new[0],)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: Cell, x: Tensor, z: Tensor, state: Maybe) -> Any:
        ctx.set_materialize_grads(False)
        rows, n = len(x), x.shape[1] // cell.gates
        of = _empty_values(cell, x, n, rows)
        h, c = (None, state) if cell.is_lstm else (state, None)
        pointers = _pointers(x, z, h, c, of.gates, of.c, of.kept, of.h)
        if kernels.library.reproml_cell(cell.number, rows, n, pointers):
            of = cell.values(x, z, x if h is None else h, c)
        ctx.cell = cell
        ctx.save_for_backward(state, *of)
        return tuple(of)

    @staticmethod
    def backward(ctx: Any, *given: Maybe) -> Any:
        cell, (state, *saved) = ctx.cell, ctx.saved_tensors
        of, g = Values(*saved), Values(*given)
        c = state if cell.is_lstm else of.c
        found = None
        if not torch.is_grad_enabled() and g.h is not None and g.gates is g.kept is None:
            if cell.is_lstm or g.c is None:
                found = _compiled_gradients(cell, of, c, g)
        if found is None:
            found = cell.gradients(of, state, g)
        return None, found.x, found.z, found.state


def _compiled_gradients(cell: Cell, of: Values, c: Maybe, g: Values) -> Optional[Gradients]:
    g_h, g_c = (None if x is None else x.contiguous() for x in (g.h, g.c))
    if not are_plain((*of, c, g_h, g_c)):
        return None
    rows, n = of.h.shape
    x = of.h.new_empty(rows, cell.gates * n)
    z = torch.empty_like(x) if cell.gates == 3 else x
    state = torch.empty_like(of.h) if cell.has_gates else None
    pointers = _pointers(of.gates, of.kept, c, of.h, g_h, g_c, x, z, state)
    if kernels.library.reproml_cell_backward(cell.number, rows, n, pointers):
        return None
    return Gradients(x, z, state)


def _empty_values(cell: Cell, like: Tensor, n: int, *shape: int) -> Values:
    h = like.new_empty(*shape, n)
    if not cell.has_gates:
        return Values(h)
    gates = like.new_empty(*shape, cell.gates * n)
    return Values(h, torch.empty_like(h), gates, torch.empty_like(h))


# ---- all steps of a layer ----------------------------------------------------------------------------


def layer(
    cell: Cell, x: Tensor, h: Tensor, c: Maybe, weight: Tensor, bias: Maybe
) -> Optional[tuple[Tensor, tuple[Tensor, ...]]]:
    """Return the outputs of all steps and the last (h,) or (h, c), as for `step`.

    x [steps, batch, gates n]: the product of the input; weight, bias: those of the hidden state.
    """
    if x.dim() != 3 or weight.dim() != 2 or not x.numel():
        return None
    batch, wide = x.shape[1:]
    n = wide // cell.gates
    state = (batch, n)
    if weight.shape != (n * cell.gates, n) or wide != len(weight) or h.shape != state:
        return None
    if (c is not None and c.shape != state) or (bias is not None and bias.shape != (wide,)):
        return None
    if not _has_node(x, h, c, weight, bias):
        return None
    outputs = []
    span = max(1, _MOST_GRADIENTS // weight.numel())
    for part in x.split(span) if len(x) > span else [x]:
        weights = [weight.t() for _ in part] + ([] if bias is None else [bias] * len(part))
        y, h, c, *_ = _Layer.apply(cell, part, h, h, c, *weights)
        outputs += [y, h]
    # After all nodes, so that the gradient of h arrives before that of the next node, as in the expression.
    outputs[1::2] = [h.unsqueeze(0) for h in outputs[1::2]]
    return torch.cat(outputs), (h,) if c is None else (h, c)


class _Layer(torch.autograd.Function):
    """Takes h twice: for the product, and for what a GRU does with it besides.

    Returns h of all steps but the last, the last h, the last c, and the other values (c: of an LSTM
    all but the last).
    """

    @staticmethod
    def forward(
        ctx: Any, cell: Cell, x: Tensor, h: Tensor, again: Tensor, c: Maybe, *weights: Tensor
    ) -> Any:
        ctx.set_materialize_grads(False)
        steps, batch, wide = x.shape
        n = wide // cell.gates
        weight, bias = weights[0], weights[steps] if len(weights) > steps else None  # [n, gates n]
        of = _empty_values(cell, x, n, steps, batch)
        y, last = x.new_empty(steps - 1, batch, n), x.new_empty(batch, n)
        all_c = of.c
        last_c: Any = torch.empty_like(last) if cell.is_lstm else None
        if cell.is_lstm:
            all_c = torch.empty_like(y)
        z, dense = torch.empty_like(x[0]), weight.contiguous()
        pointers = _pointers(x, dense, bias, z, h, c, of.gates, all_c, of.kept, y, last, last_c)
        run, done = kernels.library.reproml_layer, 0
        while (done := run(cell.number, steps, batch, n, done, pointers)) < steps:
            t = done
            h_before, c_before = (y[t - 1], all_c[t - 1] if cell.is_lstm else None) if t else (h, c)
            product = h_before @ weight if bias is None else torch.addmm(bias, h_before, weight)
            found = cell.values(x[t], product, h_before, c_before)
            (y[t] if t < steps - 1 else last).copy_(found.h)
            if cell.has_gates:
                (last_c if cell.is_lstm and t == steps - 1 else all_c[t]).copy_(found.c)
                of.gates[t].copy_(found.gates)
                of.kept[t].copy_(found.kept)
            done += 1
            if done == steps:
                break
        ctx.cell, ctx.has_bias = cell, bias is not None
        values = h, c, y, last, last_c, of.gates, of.kept, all_c
        ctx.save_for_backward(*values, *weights[:steps])
        return y, last, last_c, of.gates, of.kept, all_c

    @staticmethod
    def backward(ctx: Any, *given: Maybe) -> Any:
        return _LayerGradient(ctx, given).run()


class _LayerGradient:
    """The backward pass of a `_Layer`."""

    def __init__(self, ctx: Any, given: Sequence[Maybe]) -> None:
        self.cell: Cell = ctx.cell
        (self.h, self.c, self.y, self.last, self.last_c, *rest) = ctx.saved_tensors
        self.gates, self.kept, self.all_c, *self.weights = rest
        self.g_y, self.g_h, self.g_c, *self.g_values = given
        self.steps = len(self.y) + 1
        needs = ctx.needs_input_grad
        self.needs_h, self.needs_weight = needs[2] or needs[3], needs[5]
        self.needs_bias = ctx.has_bias and needs[5 + self.steps]
        self.has_bias = ctx.has_bias

    def run(self) -> Any:
        found = None
        if not torch.is_grad_enabled() and all(x is None for x in self.g_values):
            found = self._compiled()
        x, state, through, weights, biases = self._by_operators() if found is None else found
        h, c = (None, state) if self.cell.is_lstm else (state, None)
        every = [None] * self.steps
        weights = [x.t() for x in weights] if self.needs_weight else every
        biases = biases if self.needs_bias else every * self.has_bias
        return None, x, h, through, c, *weights, *biases

    def _values(self) -> list[tuple[Values, Tensor, Maybe]]:
        """Return the values of each step, and its h and c before."""
        hs = [*self.y.unbind(0), self.last]
        every = [None] * self.steps
        cs: list[Any] = every
        gates: Any = every
        kept: Any = every
        if self.cell.has_gates:
            cs = [*self.all_c.unbind(0), *([self.last_c] if self.cell.is_lstm else [])]
            gates, kept = self.gates.unbind(0), self.kept.unbind(0)
        before = [self.c, *cs] if self.cell.is_lstm else every
        values = map(Values, hs, cs, gates, kept)
        return list(zip(values, [self.h, *hs], before))

    def _step(self, t: int, of: Values, h: Tensor, c: Maybe, g: Values) -> Any:
        """Return the gradients of one step: of its products and state, of h, the weight and the bias."""
        found = self.cell.gradients(of, c, g)
        g_z = found.z
        g_h = weight = bias = None
        if self.needs_weight and not self.has_bias:  # the gradients of mm come in another order
            weight = g_z.t() @ h
        if self.needs_h or t:
            g_h = g_z @ self.weights[t].t()
        if self.needs_weight and self.has_bias:
            weight = g_z.t() @ h
        if self.needs_bias:
            bias = g_z.sum(0)
        return found, g_h, weight, bias

    def _by_operators(self) -> Any:
        of_gates, of_kept, of_c = self.g_values
        every: Any = [None] * self.steps
        g_y, gates, kept, cs = (
            every if x is None else [*x.unbind(0), None]
            for x in (self.g_y, of_gates, of_kept, of_c)
        )
        xs: list[Any] = []
        weights, biases = xs.copy(), xs.copy()
        g_h, g_state, through = self.g_h, None, None
        for t, (of, h, c) in reversed(list(enumerate(self._values()))):
            last = t == self.steps - 1
            if not last:
                g_h = _plus(_plus(g_y[t], None if self.cell.is_lstm else g_state), through)
            g_c = cs[t]
            if self.cell.is_lstm:
                g_c = _plus(g_c, self.g_c if last else g_state)
            g = Values(g_h, g_c, gates[t], kept[t])
            found, through, weight, bias = self._step(t, of, h, c, g)
            g_state = found.state
            xs.append(found.x)
            weights.append(weight)
            biases.append(bias)
        return torch.stack(xs[::-1]), g_state, through, weights[::-1], biases

    def _compiled(self) -> Any:
        """Compute the gradients in C; None where that is impossible."""
        cell, steps, (batch, n) = self.cell, self.steps, self.last.shape
        g_y, g_c = (None if x is None else x.contiguous() for x in (self.g_y, self.g_c))
        weight = self.weights[0].t()
        saved = (weight, self.h, self.c, self.gates, self.all_c, self.kept, self.y, self.last)
        if self.g_h is None or not are_plain((*saved, g_y, self.g_h.contiguous(), g_c)):
            return None
        wide = cell.gates * n
        g_h = self.last.new_empty(steps, batch, n)
        g_h[-1] = self.g_h
        g_y = g_y if steps > 1 else None
        states = g_h.new_empty(steps + 1, batch, n)
        if g_c is not None:
            states[-1] = g_c
        x, through = g_h.new_empty(steps, batch, wide), torch.empty_like(self.last)
        z = torch.empty_like(x) if cell.gates == 3 else x
        memory = g_y, g_h, states, x, z, through
        pointers = _pointers(*saved[:7], self.last_c, self.last, *memory)
        options = g_c is not None, self.needs_h, pointers
        run, left = kernels.library.reproml_layer_backward, steps
        values: Any = None
        while left := run(cell.number, steps, batch, n, left, *options):
            t = left = left - 1
            values = values or self._values()
            of, _, c = values[t]
            state = states[t + 1] if cell.is_lstm and (g_c is not None or t < steps - 1) else None
            found = cell.gradients(of, c, Values(g_h[t], state))
            x[t], z[t] = found.x, found.z
            if found.state is not None:
                states[t] = found.state
            if t or self.needs_h:
                through.copy_(found.z @ weight)
            if not t:
                break
            direct = states[t] if cell.gates == 3 else None
            g_h[t - 1] = _plus(_plus(None if g_y is None else g_y[t - 1], direct), through)
        state = states[0] if cell.has_gates else None
        g_z = through if self.needs_h else None
        weights: list[Tensor] = []
        if self.needs_weight:
            before = torch.cat([self.h.unsqueeze(0), self.y])
            weights = list(torch.bmm(z.transpose(1, 2), before).unbind(0))
        biases = [*z.sum(1).unbind(0)][::-1] if self.needs_bias else []  # the last step first
        return x, state, g_z, weights, biases
