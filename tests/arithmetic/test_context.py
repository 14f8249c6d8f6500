"""The context `exact()`: entering, leaving, threads, and what it changes besides operators."""

from __future__ import annotations

import _thread
import asyncio
import functools
import math
import multiprocessing.pool
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from math import cos
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import reproml
from reproml.arithmetic import patches
from reproml.arithmetic.numerics import libm
from reproml.errors import NotExactError
from tests.arithmetic.test_handlers import exact_path, refused
from verification import oracle as o
from verification.oracle import Real, check, same_bits

ones = torch.ones(3)


def active() -> bool:
    try:
        torch.special.bessel_y0(ones)
    except NotExactError:
        return True
    return False


def test_nested_contexts_end_with_the_outer():
    assert not active()
    with reproml.exact():
        assert active()
        with reproml.exact():
            assert active()
        assert active()
        with pytest.raises(ZeroDivisionError), reproml.exact():
            raise ZeroDivisionError
        assert active()
    assert not active()


def test_one_object_can_be_reused_and_nested():
    context = reproml.exact()
    for _ in range(2):
        with context, context:
            assert active()
        assert not active()


def test_decorator():
    @reproml.exact()
    def function(x, *, deep=0):
        """A docstring."""
        return function(x, deep=deep - 1) if deep else active()

    assert function(1, deep=2) and function.__doc__ == "A docstring." and not active()


def test_generators_and_coroutines_cannot_be_decorated():
    """Their bodies run after the call has returned."""

    def generator():
        yield

    async def coroutine():
        pass

    for function in (generator, coroutine):
        with pytest.raises(TypeError, match=function.__name__):
            reproml.exact()(function)
    assert not active()


def test_context_applies_to_its_thread():
    seen = []
    inside, leave = threading.Event(), threading.Event()

    def work():
        with reproml.exact():
            inside.set()
            leave.wait(10)
            seen.append(active())

    def wait():
        leave.wait(10)
        outside.append(active())

    outside: list = []
    threads = [threading.Thread(target=work), threading.Thread(target=wait)]
    for thread in threads:
        thread.start()
    inside.wait(10)
    assert not active()
    with reproml.exact():
        leave.set()
        for thread in threads:
            thread.join()
        assert active() and outside == [False]
    assert seen == [True] and not active()


# ---- threads and processes that start within exact() ---------------------------------------------

ROWS = torch.arange(4000.0).reshape(40, 100).sin() * 10


def compute():
    """Operators and a backward pass whose native bits differ from the exact ones."""
    x = ROWS.clone().requires_grad_()
    x.softmax(1).exp().sum(0).square().sum().backward()
    return x.grad


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def start_raw(function):
    done, results = threading.Event(), []

    def run():
        results.append(function())
        done.set()

    _thread.start_new_thread(run, ())
    assert done.wait(10)
    return results[0]


def new_pool(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def thread_pool(function):
    with multiprocessing.pool.ThreadPool(1) as pool:
        (mapped,) = pool.map(lambda _: function(), [0])
        assert type(mapped) is type(pool.apply(function))
        return mapped


async def off_the_loop(function):
    return await asyncio.get_running_loop().run_in_executor(None, function)


STARTS = [in_thread, start_raw, new_pool, thread_pool, lambda f: asyncio.run(off_the_loop(f))]


@pytest.mark.parametrize("start", STARTS)
def test_threads_started_within_exact_inherit_it(start):
    expected = exact_path(compute)
    with reproml.exact():
        assert same_bits(start(compute), expected)
        assert same_bits(start(lambda: in_thread(compute)), expected)
    assert not active() and not start(active) and patches._applied._users == 0
    assert not same_bits(expected, compute())


@pytest.mark.parametrize("form", ["thread", "pool"])
def test_optimizers_in_inherited_threads_are_exact(form):
    def train():
        p = torch.nn.Parameter(ROWS.clone())
        optimizer = torch.optim.Adam([p], lr=0.3)
        for _ in range(3):
            p.grad = p.detach().sin()
            optimizer.step()
        return p.detach()

    expected = exact_path(train)
    with reproml.exact():
        assert same_bits((in_thread if form == "thread" else new_pool)(train), expected)


def test_pools_made_before_exact_compute_exactly():
    expected = exact_path(compute)
    initialized = []
    with ThreadPoolExecutor(1) as pool, multiprocessing.pool.ThreadPool(1) as other:
        assert not pool.submit(active).result() and not other.apply(active)
        with reproml.exact():
            assert same_bits(pool.submit(compute).result(), expected)
            assert same_bits(next(iter(pool.map(lambda _: compute(), [0]))), expected)
            assert same_bits(other.apply_async(compute).get(), expected)
            assert same_bits(next(other.imap(lambda _: compute(), [0])), expected)
            new = ThreadPoolExecutor(1, "name", lambda: initialized.append(active()))
            assert new.submit(active).result() and initialized == [True]
        assert not pool.submit(active).result() and not other.apply(active)
        assert not new.submit(active).result() and patches._applied._users == 0
        new.shutdown()


def test_a_thread_that_never_computes_holds_nothing():
    """Such as the thread of a progress bar, which outlives exact()."""
    leave = threading.Event()
    with reproml.exact():
        thread = threading.Thread(target=lambda: (ROWS.clone().t(), leave.wait(10)))
        thread.start()
    assert patches._applied._users == 0 and torch.backends.mkldnn.enabled
    leave.set()
    thread.join()


def test_a_thread_that_computes_after_exact_is_refused():
    computed, leave, results = threading.Event(), threading.Event(), []

    def work(early):
        if early:
            compute()
            computed.set()
        leave.wait(10)
        try:
            results.append(compute())
        except NotExactError as error:
            results.append(str(error))
            with reproml.exact():
                results.append(compute())

    for early in (True, False):
        with reproml.exact():
            expected = compute()
            thread = threading.Thread(target=work, args=(early,))
            thread.start()
            assert not early or computed.wait(10)
        leave.set()
        thread.join()
        leave.clear()
        assert patches._applied._users == 0
    assert same_bits(results[0], expected) and same_bits(results[2], expected)
    assert "started within reproml.exact(), which has ended" in results[1]


def test_modes_in_an_inherited_thread_see_operators():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names: list = []

    def work():
        with Names():
            first = ROWS.exp().sum()
        return torch.stack([first, ROWS.exp().sum()])

    with reproml.exact():
        expected = ROWS.exp().sum()
        assert same_bits(in_thread(work), torch.stack([expected, expected]))
    assert names == ["aten.exp.default", "aten.sum.default"]


def test_inherited_threads_warn_of_native_operators():
    with pytest.warns(UserWarning, match="bessel_y0"), reproml.exact(on_unknown="warn"):
        in_thread(lambda: torch.special.bessel_y0(ROWS))


class Forking(torch.nn.Module):
    """Forks a module, a function and a function that forks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Softmax(1)

    def forward(self, x: torch.Tensor, scale: float = 2.0):
        first = torch.jit.fork(self.inner, x)
        second = torch.jit.fork(forked_twice, x)
        return torch.jit.wait(first) * scale + torch.jit.wait(second)


def forked_twice(x: torch.Tensor):
    future = torch.jit.fork(dropped, x)
    return torch.jit.wait(future).exp()


def dropped(x: torch.Tensor):
    return torch.dropout(torch.nn.functional.linear(x, x), 0.5, True)[:, :1]


def forked_in_a_list(x: torch.Tensor):
    futures = [torch.jit.fork(dropped, x) for i in range(2)]
    return torch.jit.wait(futures[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("start", [lambda f: f(), in_thread])
def test_scripted_functions_forked_by_jit_are_exact(start):
    module = Forking()
    script = torch.jit.script(module)

    def run(function, **options):
        torch.manual_seed(0)
        return function(ROWS, **options)

    with reproml.exact():
        for options in ({}, {"scale": 3.0}):
            for _ in range(3):
                found = start(lambda options=options: run(script, **options))
                assert same_bits(found, run(module, **options))
        with pytest.raises(NotExactError, match=r"called at .*test_context.py:\d+; call the"):
            torch.jit.script(forked_in_a_list)(ROWS)


TRANSFORMED: dict[str, Any] = {
    "grad": lambda x: torch.func.grad(lambda x: x.exp().sum())(x),
    "jacrev": lambda x: torch.func.jacrev(lambda x: x.exp().sum(1))(x),
    "vjp": lambda x: torch.func.vjp(torch.exp, x)[1](x)[0],
    "vmap": lambda x: torch.vmap(torch.func.grad(lambda x: x.softmax(0)[0]))(x),
    "functionalize": lambda x: torch.func.functionalize(lambda x: x.clone().exp_())(x),
    "cond": lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
    "gradient of cond": lambda x: torch.func.grad(lambda x: TRANSFORMED["cond"](x).sum())(x),
    "while_loop": lambda x: torch.while_loop(lambda x: x.sum() > 1, lambda x: (x.sin() / 2,), (x,))[
        0
    ],
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms_and_control_flow_are_the_same_in_threads(name):
    with reproml.exact():
        expected = TRANSFORMED[name](ROWS)
        found, after = in_thread(lambda: (TRANSFORMED[name](ROWS), ROWS.exp().softmax(1)))
        assert same_bits(found, expected)
        assert same_bits(after, ROWS.exp().softmax(1))


PROCESSES = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
import torch, reproml

def compute(_=None):
    return reproml.digest({"x": (torch.arange(4000.0).sin() * 10).exp().reshape(40, 100).softmax(1)})

class Data(torch.utils.data.Dataset):
    __len__ = lambda self: 1
    __getitem__ = lambda self, i: compute()

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    found = []
    with ProcessPoolExecutor(1, mp_context=context) as earlier:
        native = earlier.submit(compute).result()
        with reproml.exact():
            exact = compute()
            loader = torch.utils.data.DataLoader(
                Data(), num_workers=1, batch_size=None, multiprocessing_context=sys.argv[1])
            found += loader
            found.append(earlier.submit(compute).result())
            with context.Pool(1) as pool:
                found.append(pool.apply(compute))
        print(exact != native, all(x == exact for x in found), len(found))
        print(compute() == native == earlier.submit(compute).result())
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_started_within_exact_inherit_it(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    shown = subprocess.run(
        [sys.executable, script, method], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == ["True", "True", "3", "True"]


def test_concurrent_threads_give_the_same_bits():
    torch.manual_seed(0)
    a, b = torch.randn(40, 60), torch.randn(60, 30)
    g, y = torch.randn(40, 30), torch.randint(0, 30, (40,))

    def work():
        with reproml.exact():
            z = (a @ b).requires_grad_()
            torch.nn.functional.cross_entropy(z, y).backward()
            results.append((z.detach(), z.grad, g.exp().sum()))

    results: list = []
    work()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 5
    for other in results[1:]:
        assert all(same_bits(x, z) for x, z in zip(results[0], other))


def test_inference_mode_gives_the_same_bits():
    torch.manual_seed(0)
    layer, x, y = torch.nn.Linear(20, 5), torch.randn(7, 20), torch.randint(0, 5, (7,))

    def work():
        z = layer(x)
        return (
            z.detach(),
            torch.nn.functional.cross_entropy(z, y).detach(),
            torch.einsum("ij,ij->i", z, z).detach(),
        )

    with reproml.exact():
        expected = work()
        with torch.inference_mode():
            inference = work()
        with torch.no_grad():
            no_grad = work()
    for other in (inference, no_grad):
        assert all(same_bits(a, b) for a, b in zip(expected, other))


@pytest.mark.parametrize("threads", [1, 2])
def test_thread_count_does_not_change_bits(threads):
    torch.manual_seed(0)
    x = torch.randn(300, 200) * 0.1
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = exact_path(lambda: (x @ x.t()).log_softmax(1).exp().sum())
    finally:
        torch.set_num_threads(before)
    p = exact_path(lambda: (x @ x.t()).log_softmax(1).exp()).double().reshape(-1)
    check(found, Real(Fraction(sum(int(v) for v in (p * 2.0**80).tolist()), 2**80)))


def test_first_context_ignores_the_default_device():
    script = "import torch; torch.set_default_device('meta'); import reproml; reproml.exact().__enter__()"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_flushed_subnormals_are_refused():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        refused(lambda: torch.tensor([1e-38]) * 0.1)
    finally:
        torch.set_flush_denormal(False)
    assert exact_path(lambda: torch.tensor([1e-38]) * 0.1).item() > 0


def test_tensors_print_as_outside():
    for x in (torch.tensor([1.5, -0.001, 2e20]), torch.rand(2, 1200), torch.tensor([1j])):
        text = repr(x)
        assert exact_path(repr, x) == text and exact_path(str, x) == text
        assert exact_path(repr, torch.nn.Parameter(x)) == repr(torch.nn.Parameter(x))


# ---- PyTorch's schedulers ------------------------------------------------------------------------


def test_scheduler_cosine_is_correctly_rounded():
    """PyTorch's schedulers call functions of `math`."""
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([p], lr=0.1)
    with reproml.exact():
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule.step()
    expected = 0.05 * (1 + float(o.mp.cos(o.mp.mpf(np.pi / 7))))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-15)


POWERS = st.floats(1e-3, 1e3).map(lambda x: x * (-1) ** int(x * 1e6))


@given(POWERS, st.one_of(st.floats(-20, 20), st.integers(-20, 20).map(float)))
def test_powers_of_schedulers_are_correctly_rounded(base, exponent):
    native = base**exponent
    found = libm.ExactPower(base) ** exponent, base ** libm.ExactPower(exponent)
    if isinstance(native, complex):
        assert found == (native, native)
    else:
        expected = float(o.mp.power(o.mp.mpf(base), o.mp.mpf(exponent)))
        assert found == (expected, expected)


@pytest.mark.parametrize("base", [0.0, -0.0, math.inf, -math.inf, 1.0, 2.0, 0.25])
def test_powers_of_special_values(base):
    for exponent in (0.0, 1.0, 2.0, 3.0, 0.5, math.inf):
        assert libm.ExactPower(base) ** exponent == base**exponent
    with pytest.raises(ZeroDivisionError):
        0.0 ** libm.ExactPower(-1.0)


def rate(step):
    """A rate, with `math` and a function of it among the global variables of its module."""
    seen.append((math is reproml.math, cos is reproml.math.cos))
    return 0.5 * (1 + cos(math.pi * step / 7)) * math.exp(-step)


class OfRates(torch.optim.lr_scheduler.LRScheduler):
    def get_lr(self):
        return [rate(self.last_epoch) for _ in self.base_lrs]


class Callable:
    def __call__(self, step):
        return rate(step)


seen: list[Any] = []


@pytest.mark.parametrize(
    "make",
    [
        OfRates,
        lambda x: torch.optim.lr_scheduler.LambdaLR(x, rate),
        lambda x: torch.optim.lr_scheduler.LambdaLR(x, functools.partial(rate)),
        lambda x: torch.optim.lr_scheduler.MultiplicativeLR(x, Callable()),
    ],
)
def test_schedules_of_a_script_use_exact_functions(make):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with reproml.exact(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = make(optimizer)
        seen.clear()
        scheduler.step()
        assert seen == [(True, True)]
        assert (math.cos, cos) == (cos, math.cos) and cos is not reproml.math.cos
    scheduler.step()
    assert seen[1:] == [(False, False)]


@pytest.mark.parametrize("ulps, warns", [(0, True), (2, True), (-2, True), (3, False), (-3, False)])
def test_a_rate_beside_a_midpoint_is_reported(ulps, warns):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.75 + 2**-25 + ulps * 2**-53
    with reproml.exact(), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        optimizer.step()
    assert [str(x.message) for x in found if "midpoint" in str(x.message)] != [] or not warns
    assert warns or not found


def test_math_of_reproml_is_correctly_rounded():
    assert reproml.math.exp(1.0) == float(o.mp.e) and reproml.math.floor(2.5) == 2
    assert reproml.math.pow(80.0, -0.8) == float(o.mp.power(80, o.mp.mpf(-0.8)))


def schedulers(optimizer):
    library = torch.optim.lr_scheduler
    return [
        library.PolynomialLR(optimizer, 9, power=0.9),
        library.ExponentialLR(optimizer, 0.9),
        library.CyclicLR(
            optimizer, 0.01, 0.1, 3, mode="exp_range", gamma=0.97, cycle_momentum=False
        ),
    ]


def test_schedulers_use_exact_powers(monkeypatch):
    taken = []
    power = libm.power

    def counted(x, y):
        taken.append((x, y))
        return power(x, y)

    monkeypatch.setattr(libm, "power", counted)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with reproml.exact(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        polynomial, exponential, cyclic = schedulers(optimizer)
        taken.clear()
        for scheduler, arguments in ((polynomial, ()), (exponential, (5,)), (cyclic, ())):
            scheduler.step(*arguments)
            assert taken, scheduler
            taken.clear()
        assert type(polynomial.power) is float and type(exponential.gamma) is float
    polynomial.step()
    assert not taken
