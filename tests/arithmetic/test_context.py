"""The context `exact()`: entering, leaving, threads, and what it changes besides operators."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reproml
from reproml.arithmetic.numerics import libm
from reproml.errors import NotExactError
from tests.arithmetic.test_handlers import exact_path, refused
from verification import oracle as o
from verification.oracle import Real, check, same_bits

ones = torch.ones(3)


def active() -> bool:
    try:
        torch.special.bessel_j0(ones)
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


def test_context_applies_to_its_thread():
    seen = []
    inside, leave = threading.Event(), threading.Event()

    def work():
        with reproml.exact():
            inside.set()
            leave.wait(10)
            seen.append(active())

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(10)
    assert not active()
    with reproml.exact():
        leave.set()
        thread.join()
        assert active()
    assert seen == [True] and not active()


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
    power = libm._power

    def counted(x, y):
        taken.append((x, y))
        return power(x, y)

    monkeypatch.setattr(libm, "_power", counted)
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
