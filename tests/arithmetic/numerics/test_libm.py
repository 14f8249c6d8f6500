"""Python's `math`, correctly rounded: against mpmath with many more bits."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import pkgutil
from fractions import Fraction
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reproml.arithmetic import patches
from reproml.arithmetic.numerics.libm import ExactMath, ExactPower
from reproml.arithmetic.operators import optimizers

exact_math = ExactMath()

# Functions that compute with integers or compare, are exact, or are IEEE 754 operations in a fixed order.
EXACT = set(
    "ceil comb copysign degrees fabs factorial floor fma fmax fmin fmod frexp fsum gcd isclose isfinite "
    "isinf isnan isnormal issubnormal isqrt lcm ldexp modf nextafter perm prod radians remainder signbit "
    "sqrt sumprod trunc ulp".split()
)
REAL: dict[str, Any] = {
    "log2": lambda x: mpmath.log(x) / mpmath.ln2,
    "log10": lambda x: mpmath.log(x) / mpmath.ln10,
    "exp2": lambda x: mpmath.exp(x * mpmath.ln2),
    "cbrt": lambda x: mpmath.sign(x) * abs(x) ** (mpmath.mpf(1) / 3),
    "expm1": lambda x: mpmath.exp(x) - 1,
    "log1p": lambda x: mpmath.log(1 + x),
    "lgamma": lambda x: mpmath.log(abs(mpmath.gamma(x))),
    "pow": lambda x, y: mpmath.power(x, y),
    "log": lambda x, *base: mpmath.log(x) / mpmath.log(*base or [mpmath.e]),
    "hypot": lambda *x: mpmath.sqrt(sum(t * t for t in x)),
    "dist": lambda p, q: mpmath.sqrt(sum((s - t) ** 2 for s, t in zip(p, q))),
}
ONE = "acos acosh asin asinh atan atanh cbrt cos cosh erf erfc exp exp2 expm1 gamma lgamma log log10 log1p "
ONE += "log2 sin sinh tan tanh"
NUMBERS = st.one_of(
    st.floats(-1, 1), st.floats(0, 30), st.floats(-170, 170), st.integers(-20, 20).map(float)
)


def nearest(x: Any) -> float:
    sign, mantissa, exponent, _ = x._mpf_
    return float((-1) ** sign * int(mantissa) * Fraction(2) ** exponent)


def check(name: str, *args: Any) -> None:
    try:
        native = getattr(math, name)(*args)
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        with pytest.raises(type(error)):
            getattr(exact_math, name)(*args)
        return
    found = getattr(exact_math, name)(*args)
    with mpmath.workprec(5000):
        wide = [[mpmath.mpf(t) for t in x] if name == "dist" else mpmath.mpf(x) for x in args]
        function = REAL[name] if name in REAL else getattr(mpmath, name)
        expected = nearest(function(*wide))
    assert found == expected and math.copysign(1, found) == math.copysign(1, native), args


def test_every_function_of_math_is_rounded_or_exact():
    functions = {name for name, x in vars(math).items() if callable(x) and name[0] != "_"}
    rounded = {x for x in functions if getattr(exact_math, x) is not getattr(math, x)}
    assert functions - rounded <= EXACT and rounded == functions - EXACT
    assert exact_math.pi == math.pi and inspect.ismodule(exact_math)


@pytest.mark.parametrize("name", [x for x in ONE.split() if hasattr(math, x)])
@given(NUMBERS)
def test_functions_of_one_number(name, x):
    check(name, x)


@pytest.mark.parametrize("name", ["atan2", "pow", "log", "hypot"])
@given(NUMBERS, NUMBERS)
def test_functions_of_two_numbers(name, x, y):
    if name == "log" and y == 1 or name == "atan2" and 0 in (x, y):  # signs of zeros: see below
        return
    check(name, x, y)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=4))
def test_distances(points):
    check("hypot", *[x for x, _ in points])
    check("dist", *zip(*points))


@pytest.mark.parametrize("x", [0.0, -0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", [x for x in ONE.split() if hasattr(math, x)])
def test_special_values_are_those_of_math(name, x):
    try:
        native = getattr(math, name)(x)
    except (ValueError, OverflowError) as error:
        with pytest.raises(type(error)):
            getattr(exact_math, name)(x)
    else:
        assert repr(getattr(exact_math, name)(x)) == repr(native)


def test_zeros_keep_their_signs_and_angles():
    for y in (0.0, -0.0):
        for x in (0.0, -0.0, 1.0, -1.0):
            assert repr(exact_math.atan2(y, x)) == repr(math.atan2(y, x))
    assert repr(exact_math.pow(-0.0, 3.0)) == "-0.0"
    assert repr(exact_math.pow(-1e-200, 3.0)) == "-0.0"


def test_exact_ties_round_to_even():
    x, y = 94906267, 1553
    for tie in (x**2, y**5):
        assert tie.bit_length() == 54 and tie % 2
    assert exact_math.pow(x, 2) == float(x**2) == ExactPower(x) ** 2
    assert exact_math.pow(y**4, 1.25) == float(y**5) == ExactPower(y**4) ** 1.25
    beside = 1e-300  # the distance is not a tie, but nearly
    assert exact_math.dist((6.0, beside), (1.345813134622254, 0.0)) == 4.6541868653777465
    assert exact_math.hypot() == 0 and exact_math.hypot(math.inf, math.nan) == math.inf
    assert exact_math.log(8, 2) == 3 and exact_math.log(125.0, 5) == 3
    assert exact_math.log(10**400, 10) == 400


def test_powers_round_once_to_subnormal_numbers():
    tiny = 1 + 2.0**-30
    assert ExactPower(tiny * 2.0**-537) ** 2.0 == float(Fraction(tiny * 2.0**-537) ** 2)


# ---- where PyTorch takes functions and powers from -----------------------------------------------

# Module -> the functions of `math` that round, and the powers, that it takes. A new one needs a look: does
# a patch make it correctly rounded?
TAKEN = {
    "torch.nn.init": {
        "math.erf(x / math.sqrt(2.0))",  # trunc_normal_, which is replaced
        "((mode - mean) / std) ** 2",  # trunc_normal_
        "negative_slope ** 2",  # calculate_gain, which gets an ExactPower
    },
    "torch.optim.lr_scheduler": {
        "self.gamma ** self.last_epoch",
        "self.gamma ** (self.last_epoch // self.step_size)",
        "self.gamma ** self.milestones[self.last_epoch]",
        "self.gamma ** bisect_right(milestones, self.last_epoch)",
        "((1.0 - self.last_epoch / self.total_iters) / (1.0 - (self.last_epoch - 1) / self.total_iters)) "
        "** self.power",
        "(1.0 - min(self.total_iters, self.last_epoch) / self.total_iters) ** self.power",
        "math.cos(self.last_epoch * math.pi / self.T_max)",
        "math.cos(math.pi / self.T_max)",
        "math.cos(math.pi * self.last_epoch / self.T_max)",
        "math.cos(math.pi * (self.last_epoch - 1) / self.T_max)",
        "2.0 ** (x - 1)",  # a power of two: exact
        "gamma ** x",  # CyclicLR._exp_range_scale_fn, which gets an ExactPower
        "math.cos(math.pi * self.T_cur / self.T_i)",
        "math.log(epoch / self.T_0 * (self.T_mult - 1) + 1, self.T_mult)",
        "self.T_mult ** n",  # integers
        "math.cos(math.pi * pct)",
    },
    "torch.optim.swa_utils": {"math.cos(math.pi * t)"},
}


def taken(module: Any) -> set[str]:
    tree, found = ast.parse(inspect.getsource(module)), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            found.add(ast.unparse(node))
        if isinstance(node, ast.Call):
            owner, _, name = ast.unparse(node.func).rpartition(".")
            if (owner == "math" and name not in EXACT) or (owner, name) == ("", "pow"):
                found.add(ast.unparse(node))
        if isinstance(
            node, (ast.Import, ast.ImportFrom)
        ):  # by another name, no patch would find it
            names = [x.name for x in node.names if x.asname] if hasattr(node, "names") else []
            origin = getattr(node, "module", None)
            assert origin not in ("math", "cmath") and not {"math", "cmath"} & set(names)
    return found


def modules() -> list[Any]:
    names = [f"torch.optim.{x.name}" for x in pkgutil.iter_modules(torch.optim.__path__)]
    return [importlib.import_module(name) for name in [*names, "torch.nn.init"]]


def is_optimizer(module: Any) -> bool:
    """Return whether a module has an optimizer, which is defined or refused as a whole."""
    classes = [x for x in vars(module).values() if inspect.isclass(x)]
    own = [x for x in classes if x.__module__ in (module.__name__, "torch.optim")]
    return any(issubclass(x, torch.optim.Optimizer) and x is not torch.optim.Optimizer for x in own)


def test_functions_and_powers_in_pytorch_are_known():
    of_sparse_adam = "torch.optim._functional"
    for module in modules():
        if not is_optimizer(module) and module.__name__ != of_sparse_adam:
            assert taken(module) <= TAKEN.get(module.__name__, set()), module.__name__
    assert len(optimizers.DEFINED) > 5


def test_modules_that_take_functions_are_patched():
    patched = {owner.__name__ for owner, name, _ in patches.PATCHES if name == "math"}
    assert {*TAKEN, "torch.nn.functional", "torch.distributions.normal"} <= patched
