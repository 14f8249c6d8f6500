"""Small matrices against Gaussian elimination on fractions, each number rounded once."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reproml
from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics import exact_matrices
from reproml.arithmetic.operators import small_matrices_compiled as compiled
from tests.arithmetic.strategies import FINITE, MODERATE, SMALL_INTEGERS, tensors
from verification import oracle as o
from verification.oracle import NAN, Real, check, dot, reals, rounded, same_bits

LinAlgError: Any = vars(torch.linalg)["LinAlgError"]
few = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def matrices(draw: Any, rows: Any = None, columns: Any = None, kinds: Any = None) -> Any:
    m = draw(st.integers(1, 4)) if rows is None else rows
    n = m if columns is None else columns
    kind = draw(st.sampled_from(kinds or [MODERATE, FINITE, SMALL_INTEGERS]))
    batch = draw(st.sampled_from([(), (2,), (0,)]))
    return draw(tensors((*batch, m, n), kind))


def each_matrix(x: torch.Tensor) -> list[Any]:
    """Return the fractions of each matrix of a batch."""
    values = np.vectorize(Fraction, otypes=[object])
    return [values(m.double().numpy()) for m in x.reshape(-1, *x.shape[-2:])] if x.numel() else []


def eliminated(a: Any, b: Any) -> Any:
    """Return a^-1 b by Gauss-Jordan elimination, or None if a is singular."""
    m = np.concatenate([a, b], 1)
    for k in range(len(a)):
        rows = [i for i in range(k, len(a)) if m[i, k] != 0]
        if not rows:
            return None
        m[[k, rows[0]]] = m[[rows[0], k]]
        m[k] = m[k] / m[k, k]
        for i in range(len(a)):
            if i != k:
                m[i] = m[i] - m[i, k] * m[k]
    return m[:, len(a) :]


def eye(n: int) -> Any:
    return np.vectorize(Fraction, otypes=[object])(np.eye(n))


def determinant(a: Any) -> Fraction:
    """Expand along the first row."""
    if not len(a):
        return Fraction(1)
    minors = (np.delete(a[1:], j, 1) for j in range(len(a)))
    return sum(
        ((-1) ** j * x * determinant(m) for j, (x, m) in enumerate(zip(a[0], minors))), Fraction(0)
    )


def as_reals(a: Any, shape: Any) -> Any:
    if a is None:
        return np.full(shape, Real(NAN), dtype=object)
    return np.vectorize(Real, otypes=[object])(a)


def check_each(found: torch.Tensor, wanted: list[Any]) -> None:
    if not wanted:
        return
    for x, y in zip(found.reshape(len(wanted), *found.shape[-2:]), wanted):
        check(x, as_reals(y, x.shape))


@few
@given(st.data())
def test_inverse_and_solution_are_rounded_once(data):
    a = data.draw(matrices())
    n, k = a.shape[-1], data.draw(st.integers(0, 3))
    b = data.draw(tensors((n, k), MODERATE))
    batch = b.expand(*a.shape[:-2], n, k)
    with reproml.exact():
        inverse, info = torch.linalg.inv_ex(a)
        x, info2 = torch.linalg.solve_ex(a, batch)
        y, _ = torch.linalg.solve_ex(a, batch.mT, left=False)
        v, _ = torch.linalg.solve_ex(a, b[:, 0]) if k and a.dim() == 2 else (None, None)
    exact = [eliminated(m, eye(n)) for m in each_matrix(a)]
    check_each(inverse, exact)
    right = each_matrix(b)[0] if k else np.empty((n, 0), dtype=object)
    check_each(x, [eliminated(m, right) for m in each_matrix(a)])
    transposed = [eliminated(m.T, right) for m in each_matrix(a)]
    check_each(y, [None if z is None else z.T for z in transposed])
    if v is not None:
        assert same_bits(v, x[:, 0])
    assert torch.equal(info, info2)
    assert [i > 0 for i in info.reshape(-1).tolist()] == [z is None for z in exact]


def test_inverse_of_64_rows_is_rounded_once():
    torch.manual_seed(0)
    signs = torch.randint(-2, 3, (64, 64)).float() + 70 * torch.eye(64)
    with reproml.exact():
        found = torch.linalg.inv(signs)
        with pytest.raises(reproml.NotExactError, match="up to 64 rows and columns, not for"):
            torch.linalg.inv(torch.eye(65))
        with pytest.raises(LinAlgError, match="singular"):
            torch.linalg.inv(torch.zeros(2, 2))
        with pytest.raises(LinAlgError, match="singular"):
            torch.linalg.solve(torch.ones(2, 2), torch.ones(2))
        with pytest.raises(reproml.NotExactError, match="infinities or NaN"):
            torch.linalg.det(torch.full((2, 2), torch.inf))
    column = eliminated(each_matrix(signs)[0], eye(64)[:, 5:6])
    check(found[:, 5:6], as_reals(column, None))


@few
@given(matrices())
def test_determinant_and_its_gradient_are_rounded_once(a):
    a.requires_grad_()
    with reproml.exact():
        value = torch.linalg.det(a)
        sign, log = torch.linalg.slogdet(a)
        value.sum().backward()
    exact = [determinant(m) for m in each_matrix(a.detach())]
    check(value.detach().reshape(-1), [Real(x) for x in exact])
    check(log.detach().reshape(-1), [o.log(Real(abs(x))) for x in exact])
    assert sign.reshape(-1).tolist() == [(x > 0) - (x < 0) for x in exact]
    cofactors = []
    for m in each_matrix(a.detach()):
        minors = [
            [
                (-1) ** (i + j) * determinant(np.delete(np.delete(m, i, 0), j, 1))
                for j in range(len(m))
            ]
            for i in range(len(m))
        ]
        cofactors.append(np.array(minors, dtype=object).reshape(len(m), len(m)))
    if cofactors:
        check_each(a.grad, cofactors)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_gradient_of_singular_determinant(rank):
    torch.manual_seed(rank)
    a: Any = (
        (torch.randint(-3, 4, (4, rank)) @ torch.randint(-3, 4, (rank, 4))).float().requires_grad_()
    )
    with reproml.exact():
        torch.linalg.det(a).backward()
        with pytest.raises(reproml.NotExactError, match="use slogdet"):
            torch.func.jacrev(torch.func.grad(torch.linalg.det))(a.detach())
    (m,) = each_matrix(a.detach())
    minors = [determinant(np.delete(np.delete(m, i, 0), j, 1)) for i in range(4) for j in range(4)]
    signs = [(-1) ** (i + j) for i in range(4) for j in range(4)]
    check(a.grad.reshape(-1), [Real(s * x) for s, x in zip(signs, minors)])
    assert (rank < 3) == (not a.grad.any())


def test_gradients_of_systems_are_solutions():
    """Two right sides, so that each element of the gradient of a is a sum of two products."""
    torch.manual_seed(0)
    a, b, g = torch.randn(3, 3), torch.randn(3, 2), torch.randn(3, 2)
    for left in (True, False):
        u, v = a.clone().requires_grad_(), (b if left else b.T.contiguous()).requires_grad_()
        with reproml.exact():
            x = torch.linalg.solve(u, v, left=left)
            of_a, of_b = torch.autograd.grad(x, [u, v], g if left else g.T)
            logs = torch.linalg.slogdet(u)[1]
            (of_log,) = torch.autograd.grad(logs, u)
            inverse = torch.linalg.inv(a)
        assert same_bits(of_log, inverse.T)
        (m,), (right,) = each_matrix(a), each_matrix(g)
        h = rounded(as_reals(eliminated(m.T if left else m, right), None))
        check(of_b if left else of_b.T, h)
        y = reals(x.detach() if left else x.detach().T)
        outer = [[-dot(p, q) for q in y] for p in h]
        check(of_a if left else of_a.T, np.array(outer, dtype=object))
        v.requires_grad_(False)


@few
@given(matrices(kinds=[MODERATE, SMALL_INTEGERS]), st.booleans(), st.booleans())
def test_triangular_solution_is_rounded_once(a, upper, unit):
    n = a.shape[-1]
    b = torch.arange(2 * n).float().reshape(n, 2) - 1.5
    with reproml.exact():
        x = torch.linalg.solve_triangular(a, b, upper=upper, unitriangular=unit)
        y = torch.linalg.solve_triangular(
            a, b.T.contiguous(), upper=upper, left=False, unitriangular=unit
        )
        old = torch.triangular_solve(b, a, upper, True, unit)[0]
    wanted, from_right = [], []
    for m in each_matrix(a):
        m = np.triu(m) if upper else np.tril(m)
        if unit:
            m[np.arange(n), np.arange(n)] = Fraction(1)
        wanted.append(eliminated(m, each_matrix(b)[0]))
        from_right.append(eliminated(m.T, each_matrix(b)[0]))
    check_each(x, wanted)
    check_each(y, [None if z is None else z.T for z in from_right])
    check_each(old, from_right)


def factors(a: Any) -> Any:
    """Return the pivots, L and U of exact elimination with the largest pivots."""
    m, lower = a.copy(), np.zeros_like(a)
    lower[:] = Fraction(0)
    pivots = []
    for k in range(min(m.shape)):
        best = max(range(k, len(m)), key=lambda i: (abs(m[i, k]), -i))
        pivots.append(best + 1)
        m[[k, best]], lower[[k, best]] = m[[best, k]], lower[[best, k]]
        for i in range(k + 1, len(m)):
            if m[k, k] != 0:
                lower[i, k] = m[i, k] / m[k, k]
                m[i] = m[i] - lower[i, k] * m[k]
    return pivots, lower, m


@few
@given(st.data())
def test_lu_factors_are_rounded_once(data):
    a = data.draw(matrices(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))))
    b = torch.ones(a.shape[-2], 1)
    with reproml.exact():
        lu, pivots, info = torch.linalg.lu_factor_ex(a)
        p, lower, upper = torch.linalg.lu(a)
        if a.shape[-1] == a.shape[-2]:
            x = torch.linalg.lu_solve(lu, pivots, b)
            y = torch.linalg.lu_solve(lu, pivots, b, adjoint=True)
    exact = [factors(m) for m in each_matrix(a)]
    check_each(lu, [np.triu(u) + np.tril(low, -1) for _, low, u in exact])
    assert pivots.reshape(-1).tolist() == [i for p, _, _ in exact for i in p]
    zero = [next((k + 1 for k in range(min(u.shape)) if u[k, k] == 0), 0) for _, _, u in exact]
    assert info.reshape(-1).tolist() == zero
    assert same_bits(upper, lu[..., : upper.shape[-2], :].triu())
    if a.shape[-1] == a.shape[-2]:
        given_factors = zip(each_matrix(lu), each_matrix(p))
        products = [q.dot((np.tril(m, -1) + eye(len(m))).dot(np.triu(m))) for m, q in given_factors]
        right = each_matrix(b)[0]
        check_each(x, [eliminated(m, right) for m in products])
        check_each(y, [eliminated(m.T, right) for m in products])


def root_factor(a: Any) -> Any:
    """Return L with L L^T = a in real numbers, or None."""
    n = len(a)
    lower = np.full((n, n), Real(0), dtype=object)
    m = a.copy()
    for k in range(n):
        if m[k, k] <= 0:
            return None
        for i in range(k, n):
            lower[i, k] = Real(m[i, k]) / o.sqrt(Real(m[k, k]))
        for i in range(k + 1, n):
            for j in range(k + 1, n):
                if j <= i:
                    m[i, j] -= m[i, k] * m[j, k] / m[k, k]
    return lower


@few
@given(matrices(kinds=[MODERATE, SMALL_INTEGERS]), st.sampled_from([0.0, 1.0, 30.0]))
def test_cholesky_factor_is_rounded_once(x, more):
    a = x @ x.mT + more * torch.eye(x.shape[-1])
    with reproml.exact():
        lower, info = torch.linalg.cholesky_ex(a)
        upper, _ = torch.linalg.cholesky_ex(a, upper=True)
        b = torch.ones(a.shape[-1], 1)
        y = torch.cholesky_solve(b, lower)
        inverse = torch.cholesky_inverse(upper, upper=True)
        if not info.any():
            assert same_bits(torch.linalg.cholesky(a), lower)
    for matrix, found, of_upper, failed in zip(
        a.reshape(-1, *a.shape[-2:]),
        lower.reshape(-1, *a.shape[-2:]),
        upper.reshape(-1, *a.shape[-2:]),
        info.reshape(-1).tolist(),
    ):
        wanted = root_factor(each_matrix(matrix)[0])
        assert (wanted is None) == (failed > 0)
        if wanted is not None:
            check(found, wanted)
        # The upper factor is that of the upper triangle, which holds the same numbers if a is symmetric.
        if torch.equal(matrix, matrix.mT):
            assert same_bits(of_upper, found.mT)
    products = [low.dot(low.T) for low in each_matrix(lower)]
    check_each(y, [eliminated(m, each_matrix(b)[0]) for m in products])
    products = [up.T.dot(up) for up in each_matrix(upper)]
    check_each(inverse, [eliminated(m, eye(len(m))) for m in products])


@few
@given(st.data())
def test_least_squares_and_pseudoinverse_are_rounded_once(data):
    m, n = data.draw(st.sampled_from([(3, 2), (2, 3), (3, 3), (4, 1)]))
    small = data.draw(tensors((m, n), st.floats(-1, 1, width=32))).clamp(-1, 1)
    a = small + 4 * torch.eye(m, n)  # of full rank
    b = data.draw(tensors((m, 2), MODERATE))
    with reproml.exact():
        x, residuals, _, _ = torch.linalg.lstsq(a, b, driver="gels")
        same, none, rank, _ = torch.linalg.lstsq(a, b)
        inverse = torch.linalg.pinv(a)
    assert same_bits(x, same) and not none.numel() and int(rank) == min(m, n)
    (f,), (right,) = each_matrix(a), each_matrix(b)
    if m >= n:
        exact = eliminated(f.T.dot(f), f.T)
    else:
        exact = eliminated(f.dot(f.T), eye(m))
        exact = f.T.dot(exact)
    check(inverse, as_reals(exact, None))
    solution = exact.dot(right)
    check(x, as_reals(solution, None))
    if m > n:
        check(residuals, as_reals(((f.dot(solution) - right) ** 2).sum(0), None))


def test_rank_that_depends_on_rounding_is_refused():
    nearly = torch.tensor([[1.0, 1.0], [1.0, 1 + 2.0**-23]])
    deficient = torch.ones(3, 2)
    with reproml.exact():
        assert same_bits(torch.linalg.pinv(deficient), torch.full((2, 3), 1 / 6))
        for function in (torch.linalg.pinv, lambda x: torch.linalg.lstsq(x, torch.ones(2, 1))):
            with pytest.raises(reproml.NotExactError, match="no certain rank"):
                function(nearly)
        with pytest.raises(reproml.NotExactError, match="no certain rank"):
            torch.linalg.lstsq(deficient, torch.ones(3, 1))
        with pytest.raises(reproml.NotExactError, match="use driver='gelsy'"):
            torch.linalg.lstsq(nearly, torch.ones(2, 1), driver="gelsd")
        with pytest.raises(reproml.NotExactError, match="no certain rank"):
            torch.linalg.pinv(torch.diag(torch.tensor([1.0, 0.1])), rtol=0.2)


def test_transforms_of_determinants_and_systems():
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, 4), torch.randn(3, 4)
    with reproml.exact():
        assert same_bits(torch.func.vmap(torch.linalg.det)(a), torch.linalg.det(a))
        assert same_bits(torch.func.vmap(torch.linalg.solve)(a, b), torch.linalg.solve(a, b))
        gradients = torch.func.vmap(torch.func.grad(torch.linalg.det))(a)
        leaf: Any = a.clone().requires_grad_()
        torch.linalg.det(leaf).sum().backward()
    assert same_bits(gradients, leaf.grad)


# ---- the loops ----------------------------------------------------------------------------------------

needs_loops = pytest.mark.skipif(kernels.library is None, reason="the compiled loops are not built")


@needs_loops
@few
@given(st.integers(1, 6), st.integers(0, 1000), st.booleans(), st.booleans())
def test_ends_enclose_the_exact_numbers(n, seed, whole, nearly_singular):
    """`whole`: matrices of whole numbers, for both methods of elimination."""
    random = torch.Generator().manual_seed(seed)
    a = torch.randint(-9, 10, (n, n + 2), generator=random).float()
    a = a if whole else a * torch.rand(n, n + 2, generator=random)
    if nearly_singular:
        a[-1, :n] = a[:-1, :n].sum(0) + 2.0**-20 * a[-1, :n]
    augmented = a.double().numpy()[None] / 256
    exact = eliminated(each_matrix(a[:, :n])[0], each_matrix(a[:, n:])[0])
    for method in (0, 1):
        ends, determinant = np.zeros((2, n, 2)), np.zeros(2)
        exponent, info = np.zeros(1, np.int64), np.zeros(1, np.int32)
        kernels.library.reproml_solve(
            *(method, 1, n, 2, compiled._pointers([augmented]), 0),
            *[x.ctypes.data for x in (*ends, determinant, exponent, info)],
        )
        if exact is None:
            assert info[0] != 0
        elif info[0] == 0:
            for low, x, high in zip(ends[0].flat, exact.flat, ends[1].flat):
                assert low <= x <= high and high - low <= 2.0**-40 * abs(x)
            d = determinant_of(each_matrix(a[:, :n])[0]) / Fraction(256) ** n
            low, high = (Fraction(x) * Fraction(2) ** int(exponent[0]) for x in determinant)
            assert low <= d <= high
        else:  # a number that may be 0; plain elimination does not find all zeros of whole numbers
            assert info[0] == -1 and (nearly_singular or (whole and method == 0))


def determinant_of(a: Any) -> Fraction:
    d, m = Fraction(1), a.copy()
    for k in range(len(a)):
        row = next(i for i in range(k, len(a)) if m[i, k] != 0)
        if row != k:
            m[[k, row]], d = m[[row, k]], -d
        d *= m[k, k]
        for i in range(k + 1, len(a)):
            m[i] = m[i] - m[i, k] / m[k, k] * m[k]
    return d


def test_products_of_factors_far_apart_are_not_taken_for_singular():
    """Products of two binary32 numbers reach down to 2^-298, and those of two such products underflow."""
    random = torch.Generator().manual_seed(0)
    exponents = torch.tensor([-149, -145, 0, 60, 127])[
        torch.randint(5, (40, 3, 3), generator=random)
    ]
    lower = torch.tril(torch.exp2(exponents.double()).float())
    lower[0] = torch.tensor([[2.0**-149, 0, 0], [2.0**-149, 2.0**-149, 0], [0, 0, 2.0**127]])
    b = torch.tensor([[0.0], [1.0], [2.0**127]])
    with reproml.exact():
        x = torch.cholesky_solve(b, lower)
    products = [m.dot(m.T) for m in each_matrix(lower)]
    check_each(x, [eliminated(m, each_matrix(b)[0]) for m in products])


@needs_loops
@pytest.mark.parametrize("n", [1, 8, 40, 64])
def test_loops_decide_every_random_matrix(n):
    torch.manual_seed(n)
    a = np.asarray(torch.randn(3, n, n).double())
    symmetric = np.asarray((torch.from_numpy(a) @ torch.from_numpy(a).mT).float().double())
    right = np.asarray(torch.randn(3, n, 2).double())
    found = compiled.solve([a], [right])
    lower = np.tril(a) + 8 * np.eye(n)
    assert not found.left.any() and not compiled.solve([a], [a[..., :0]]).left.any()
    assert not compiled.solve([lower, lower.transpose(0, 2, 1)], [right]).left.any()
    factors, cholesky = compiled.factorize(a), compiled.factorize(symmetric, cholesky=True)
    assert not factors.left.any() and not cholesky.left.any()
    if n <= 40:
        assert (found.x[0] == exact_matrices.solve([a[0]], right[0])).all()
        lu = exact_matrices.lu(a[1])
        assert (factors.factors[1] == lu.lu).all() and factors.pivots[1].tolist() == lu.pivots
        assert (cholesky.factors[2] == exact_matrices.cholesky(symmetric[2])[0]).all()


@needs_loops
def test_loops_decide_matrices_of_whole_numbers():
    """Zeros and ties are among their results: 2^24 + 1 is a midpoint of two binary32 numbers."""
    torch.manual_seed(1)
    a = np.asarray(torch.randint(-4, 5, (50, 8, 8)).double())
    a[0] = np.eye(8) - np.eye(8, k=1)
    a[1, :, 5] = a[1, :, 2]
    right = np.ones((50, 8, 1))
    right[0, :, 0] = [2.0**24, 0, 0, 0, 0, 0, 0, 1]
    found = compiled.solve([a], [right])
    adjugate = compiled.solve([a], [np.broadcast_to(np.eye(8), a.shape)], adjugate=True)
    assert not found.left.any() and not adjugate.left.any() and not compiled.factorize(a).left.any()
    assert found.x[0, 0] == 2.0**24
    for i in np.nonzero(found.info == 0)[0]:
        assert (found.x[i] == exact_matrices.solve([a[i]], right[i])).all()
        assert (adjugate.x[i].T == exact_matrices.cofactors(a[i])).all()
    assert found.info[1] == 6 and np.isnan(found.x[1]).all()


def test_logarithm_of_determinant_beyond_the_range_of_numbers():
    small, large = torch.eye(64) * 2.0**-149, torch.eye(64) * 2.0**127
    with reproml.exact():
        _, logs = torch.linalg.slogdet(torch.stack([small, large]))
    check(logs, [o.log(Real(Fraction(2) ** e)) for e in (-149 * 64, 127 * 64)])


def with_exact_zeros(n: int) -> Any:
    """Return systems of normal numbers whose solutions have exact zeros and ties among others."""
    torch.manual_seed(n)
    a = torch.randn(20, n, n).triu().double()
    return np.asarray(a), np.asarray(torch.randn(20, n, n).tril(-1).double() + a)


@needs_loops
@pytest.mark.parametrize("scale", [2.0**-130, 1.0, 2.0**100])
def test_short_numbers_of_solutions_are_proven(scale):
    a, b = with_exact_zeros(5)
    a[0], b[0] = np.diag([1.0, 3, 5, 7, 9]), np.diag([1, 3 * (1 + 2.0**-24), 0, 7, 1])
    b[0, 1, 1] = np.float32(3.0)
    a, b = [(x * scale).astype(np.float32).astype(np.float64) for x in (a, b)]
    found = compiled.solve([a], [b])
    assert not found.left.any()
    for i in range(len(a)):
        assert (found.x[i] == exact_matrices.solve([a[i]], b[i])).all()
    assert (found.x == 0).any()


@needs_loops
def test_wrong_candidates_are_refuted():
    """The numbers of the solution are changed by 2^-40, and zeros to 2^-90."""
    a, b = with_exact_zeros(4)
    found = compiled.solve([a], [b])
    for change in (0.0, 2.0**-40):
        x = np.where(found.x == 0, change and 2.0**-90, found.x * (1 + change))
        unsure = np.ones(x.shape, dtype=np.uint8)
        info, rank = np.zeros((2, len(a)), dtype=np.int32)
        pointers = [y.ctypes.data for y in (b, x, unsure, info, rank)]
        kernels.library.reproml_decide(len(a), 4, 4, a.ctypes.data, None, *pointers)
        assert ((unsure == 0) == exact_equal(a, b, x)).all()


def exact_equal(a: Any, b: Any, x: Any) -> Any:
    """Return which numbers of x are exactly those of the solution."""
    fractions = np.vectorize(Fraction, otypes=[object])
    return np.array(
        [eliminated(fractions(p), fractions(q)) == fractions(r) for p, q, r in zip(a, b, x)]
    )


@needs_loops
@pytest.mark.parametrize(("n", "rank"), [(6, 3), (6, 5), (64, 62)])
def test_singular_matrices_are_recognized_by_remainders(n, rank):
    torch.manual_seed(rank)
    a = torch.randn(3, n, n).double().numpy()
    a[:, :, rank:] = a[:, :, :1] * 2.0 ** np.arange(n - rank)
    found = compiled.solve([a], [np.broadcast_to(np.eye(n), a.shape)], adjugate=True)
    assert found.info.tolist() == [rank + 1] * 3 and found.rank.tolist() == [rank] * 3
    assert rank == n - 1 or not found.x.any()
    assert not compiled.solve([a], [a[..., :1]]).left.any()
    with reproml.exact():
        sign, log = torch.linalg.slogdet(torch.from_numpy(a).float())
    assert not sign.any() and (log == -np.inf).all()


def test_moduli_are_primes():
    path = Path(exact_matrices.__file__).parents[1] / "csrc" / "residues.c"
    table = re.search(r"BELOW_2_62\[PRIMES\] = \{([^}]*)\}", path.read_text())
    assert table
    primes = [2**62 - int(x) for x in table[1].split(",")]
    assert len(set(primes)) == 320 and min(primes) > 2**61
    assert all(pow(b, p - 1, p) == 1 for p in primes for b in (2, 3, 5, 7, 11, 13))


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-128, 2.0**100])
@pytest.mark.parametrize("shape", [(3, 3), (5, 3), (3, 5)])
def test_pseudoinverse_far_from_one_is_rounded_once(shape, scale):
    torch.manual_seed(0)
    a = (torch.randint(-40, 40, (10, *shape)).double() * scale).float()
    with reproml.exact():
        found = torch.linalg.pinv(a)
    for x, y in zip(found, a.double().numpy()):
        assert same_bits(x, torch.from_numpy(exact_matrices.pseudoinverse(y)[0]).float())
    with reproml.exact(), pytest.raises(reproml.NotExactError, match="no certain rank"):
        torch.linalg.pinv(a, atol=100 * scale)


@needs_loops
def test_systems_of_a_wide_range_are_decided_in_the_loop():
    """The identity has exact zeros, which are proven modulo primes, more of them for a wider range."""
    torch.manual_seed(0)
    a = torch.randn(1, 64, 64).double()
    a[0, 3, 4] *= 2.0**-40
    a = a.float().double()
    found = compiled.solve([a.numpy()], [a.numpy()])
    assert not found.left.any() and (found.x == np.eye(64)).all()


@needs_loops
@pytest.mark.parametrize("scale", [2.0**-100, 1.0, 2.0**100])
def test_determinants_do_not_leave_the_range_of_binary64(scale):
    torch.manual_seed(0)
    a = (torch.randn(4, 30, 30) * scale).double().numpy()
    a[:2, :, ::2] *= 2.0**-26
    found = compiled.solve([a], [a[..., :0]])
    assert not found.left.any()
    for i, exact in enumerate(map(exact_matrices.determinant, a)):
        unit = Fraction(2) ** int(found.exponent[i])
        low, high = (Fraction(float(x[i])) * unit for x in (found.low, found.high))
        assert low <= exact <= high and high - low < abs(exact) / 2**50


@needs_loops
def test_the_determinant_of_a_preconditioned_matrix_is_not_that_of_the_product():
    a = torch.randn(1, 5, 5).double().numpy()
    found = compiled.solve([a], [np.eye(5)[None]])
    found.left[:] = True
    compiled._solve_near_identity(found, a, np.eye(5)[None])
    assert not found.left.any() and np.isinf(found.low).all() and np.isinf(found.high).all()


@pytest.mark.parametrize(
    "given", [{"atol": 1e200}, {"rtol": 1e300}, {"atol": np.inf}, {"rtol": np.nan}]
)
def test_tolerances_without_a_certain_rank_are_refused(given):
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    with reproml.exact():
        with pytest.raises(reproml.NotExactError, match="certain rank"):
            torch.linalg.pinv(a, **given)
        with pytest.raises(reproml.NotExactError, match="certain rank"):
            torch.linalg.lstsq(a, a, rcond=max(given.values()))


@pytest.mark.parametrize("pivots", [[-1, 2], [0, 1], [1, 3]])
def test_pivots_out_of_range_are_refused(pivots):
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    with reproml.exact(), pytest.raises(RuntimeError, match="between 1 and 2"):
        torch.linalg.lu_solve(a, torch.tensor(pivots, dtype=torch.int32), a)
