"""The CTC loss, in correctly rounded steps of a fixed order.

A target of S labels is written with blanks around each label: l[0], ..., l[2 S]. With log probabilities
y[t, c] (A. Graves et al., ICML 2006),

    alpha[t, s] = fl(log(exp alpha[t-1, s] + exp alpha[t-1, s-1] + exp alpha[t-1, s-2]) + y[t, l[s]]),

where the last term is left out if l[s] is a blank or l[s] = l[s-2], and beta[t, s] in the same way from
the end. The loss is -fl(log(exp alpha[T-1, 2 S] + exp alpha[T-1, 2 S - 1])). The
gradient of y[t, c] is fl(g (exp y[t, c] - p[t, c])), where p[t, c] is the sum, rounded once, of
fl(exp(alpha[t, s] + beta[t, s] + loss - y[t, c])) over all s with l[s] = c.

Each step of alpha adds an error of at most half an ulp of it, and passes those before on without enlarging
them, so the loss is within T 2^-24 max |alpha| of the exact one, and p within a factor of
exp(2 T 2^-24 max |alpha|) (1 + 2^-23).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.numerics.formats import reach
from reproml.arithmetic.numerics.rounding import U, two_sum
from reproml.arithmetic.operators.arguments import require, require_shape
from reproml.arithmetic.operators.indexing import scatter_add

INFINITY = float("inf")

Lengths = Union[Tensor, Sequence[int]]


class _Problem(NamedTuple):
    """What the steps read.

    y: float32 [t, n, 2 s + 1], the log probabilities of l. labels: int64 [n, 2 s + 1], l. skips: whether
    l[s] may follow l[s - 2]. last: int64 [n], 2 S. inputs: int64 [n], the numbers of steps.
    """

    y: Tensor
    labels: Tensor
    skips: Tensor
    last: Tensor
    inputs: Tensor


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Lengths,
    target_lengths: Lengths,
    blank: int = 0,
    zero_infinity: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute aten._ctc_loss: the losses [n], infinite where no path exists, and alpha [n, t, 2 s + 1]."""
    problem = _problem(log_probs, targets, input_lengths, target_lengths, blank)
    steps = len(log_probs)
    start = torch.arange(problem.labels.shape[1], device=log_probs.device)
    first = (start <= 1) & (start <= problem.last.unsqueeze(1))
    alphas: list[Tensor] = []
    for y in problem.y:
        if alphas:
            alpha = alphas[-1]
            two_before = torch.where(problem.skips, _shifted(alpha, 2), -INFINITY)
            alphas.append(_step(alpha, _shifted(alpha, 1), two_before, y))
        else:
            alphas.append(torch.where(first, y, -INFINITY))
    shape = (len(problem.last), steps, problem.labels.shape[1])
    log_alpha = torch.stack(alphas, 1) if alphas else log_probs.new_empty(shape)
    return _loss(log_alpha, problem), log_alpha


def _loss(log_alpha: Tensor, problem: _Problem) -> Tensor:
    none = torch.where(problem.last == 0, 0.0, INFINITY).to(log_alpha.dtype)
    if not log_alpha.shape[1]:
        return none
    at = (problem.inputs - 1).clamp(min=0).reshape(-1, 1, 1)
    end = log_alpha.gather(1, at.expand(-1, 1, log_alpha.shape[2])).squeeze(1)
    last = problem.last.unsqueeze(1)
    blank = end.gather(1, last).squeeze(1)
    label = torch.where(
        problem.last > 0, end.gather(1, (last - 1).clamp(min=0)).squeeze(1), -INFINITY
    )
    nothing = torch.full_like(blank, -INFINITY)
    loss = -_step(blank, label, nothing, torch.zeros_like(blank)) + 0.0
    return torch.where(problem.inputs > 0, loss, none)


def _problem(
    log_probs: Tensor, targets: Tensor, inputs: Lengths, targets_lengths: Lengths, blank: int
) -> _Problem:
    device = log_probs.device
    steps, n, classes = log_probs.shape
    lengths = [
        x.tolist() if isinstance(x, Tensor) else [int(v) for v in x]
        for x in (inputs, targets_lengths)
    ]
    require(0 <= blank < classes, "blank must be in label range")
    require(
        len(lengths[0]) == n and len(lengths[1]) == n, "ctc_loss: one length for each batch element"
    )
    require(
        all(0 <= x <= steps for x in lengths[0]),
        f"Expected input_lengths to have values between 0 and {steps}",
    )
    require(all(x >= 0 for x in lengths[1]), "Expected target_lengths to have values of at least 0")
    longest = max(lengths[1], default=0)
    columns = torch.arange(longest, device=device)
    sizes = torch.tensor(lengths[1], dtype=torch.int64).to(device)
    if targets.dim() == 1:
        require(sum(lengths[1]) == len(targets), "ctc_loss: the targets have another total length")
        starts = (torch.tensor(lengths[1], dtype=torch.int64).cumsum(0)).to(device) - sizes
        at = starts.unsqueeze(1) + columns
        flat = targets.long()
    else:
        require(
            targets.shape[0] == n and targets.shape[1] >= longest,
            "ctc_loss: the targets are smaller than their lengths",
        )
        at = torch.arange(n, device=device).unsqueeze(1) * targets.shape[1] + columns
        flat = targets.reshape(-1).long()
    used = columns < sizes.unsqueeze(1)
    padded = torch.cat([flat, flat.new_full((1,), blank)])  # what is not used counts as a blank
    words = padded[torch.where(used, at, len(flat))]
    labels = torch.full((n, 2 * longest + 1), blank, dtype=torch.int64, device=device)
    labels[:, 1::2] = words
    skips = (labels != blank) & (labels != _shifted(labels, 2, blank))
    y = log_probs.gather(2, labels.expand(steps, *labels.shape))
    return _Problem(y, labels, skips, 2 * sizes, torch.tensor(lengths[0]).to(device))


def _shifted(x: Tensor, by: int, fill: Any = -INFINITY) -> Tensor:
    """Return x with `by` elements before it instead of its last ones; for by < 0 behind it."""
    width = x.shape[1]
    empty = x.new_full((len(x), min(abs(by), width)), fill)
    if by > 0:
        return torch.cat([empty, x[:, : max(width - by, 0)]], 1)
    return torch.cat([x[:, -by:], empty], 1)


def _step(a: Tensor, b: Tensor, c: Tensor, y: Tensor) -> Tensor:
    """Return log(exp a + exp b + exp c) + y, rounded once; minus infinity if no term is larger."""
    # The terms from the largest to the smallest, whatever their order.
    top = torch.maximum(torch.maximum(a, b), c)
    middle = torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
    last = torch.minimum(torch.minimum(a, b), c)
    reached = (top != -INFINITY) & (y != -INFINITY)
    # The logarithm of 1 + exp(-1000) is below 2^-1440: it rounds to 0, and beside any other binary32 number
    # it counts as zero (compiler/evaluate.py).
    negligible = [(x < top.double() - reach(1000)) & top.isfinite() for x in (middle, last)]
    use = [(x != -INFINITY) & ~small for x, small in zip((middle, last), negligible)]
    top = torch.where(reached, top, 0.0)

    def formula(ctx: Any, a: Any, b: Any, c: Any, with_b: Any, with_c: Any, y: Any) -> Any:
        return a + y + ctx.log1p(with_b * ctx.exp(b - a) + with_c * ctx.exp(c - a))

    value = elementwise(
        formula,
        top,
        torch.where(use[0], middle, top),
        torch.where(use[1], last, top),
        use[0].float(),
        use[1].float(),
        torch.where(reached, y, 0.0),
    )
    return torch.where(reached, value, -INFINITY)


def _exp_of_sum(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Return exp(a + b + c + d), rounded once."""
    s, lost = two_sum(a.double(), b.double())
    r, more = two_sum(c.double(), d.double())
    total, last = two_sum(s, r)
    error = 4 * U * (lost.abs() + more.abs() + last.abs())  # of the three additions to `total`
    total = total + lost + more + last
    error = error + 4 * U * total.abs()
    # Terms of 1e30 seldom cancel: where the sum is far from 0, no more than its sign is needed.
    below, beyond = total + error < -reach(110), total - error > reach(100)
    terms = [torch.where(below | beyond, 0.0, x) for x in (a, b, c, d)]
    value = elementwise(lambda ctx, a, b, c, d: ctx.exp(a + b + c + d), *terms)
    return torch.where(below, 0.0, torch.where(beyond, INFINITY, value))


def ctc_loss_backward(
    grad: Tensor,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Lengths,
    target_lengths: Lengths,
    neg_log_likelihood: Tensor,
    log_alpha: Tensor,
    blank: int,
    zero_infinity: bool = False,
) -> Tensor:
    """Compute aten._ctc_loss_backward from the rounded losses and alpha.

    Where there is no path the gradient is NaN, or 0 with zero_infinity; behind the end of an input it is 0.
    """
    problem = _problem(log_probs, targets, input_lengths, target_lengths, blank)
    steps, n, classes = log_probs.shape
    require_shape("log_alpha", log_alpha, (n, steps, problem.labels.shape[1]))
    place = torch.arange(problem.labels.shape[1], device=log_probs.device)
    last = problem.last.unsqueeze(1)
    at_end = (place == last) | (place == last - 1)
    beta = log_alpha.new_full((n, len(place)), -INFINITY)
    follows = _shifted(problem.skips, -2, False)
    loss = neg_log_likelihood.unsqueeze(1)
    sums = []
    for t in reversed(range(steps)):
        y = problem.y[t]
        two_behind = torch.where(follows, _shifted(beta, -2), -INFINITY)
        beta = _step(beta, _shifted(beta, -1), two_behind, y)
        ends = (problem.inputs - 1 == t).unsqueeze(1)
        beta = torch.where(ends, torch.where(at_end, y, -INFINITY), beta)
        alpha = log_alpha[:, t]
        used = (alpha != -INFINITY) & (beta != -INFINITY) & loss.isfinite()
        p = _exp_of_sum(*[torch.where(used, x, 0.0) for x in (alpha, beta, loss, -y)])
        zeros = log_probs.new_zeros(n, classes)
        sums.append(scatter_add(zeros, 1, problem.labels, torch.where(used, p, 0.0)))
    if not sums:
        return torch.zeros_like(log_probs)
    total = torch.stack(sums[::-1])
    g = grad.reshape(1, n, 1).expand(log_probs.shape)
    result = elementwise(lambda ctx, g, y, p: g * (ctx.exp(y) - p), g, log_probs, total)
    missing = 0.0 if zero_infinity else torch.nan
    result = torch.where((neg_log_likelihood == INFINITY).reshape(1, n, 1), missing, result)
    step = torch.arange(steps, device=log_probs.device).reshape(-1, 1, 1)
    return torch.where(step < problem.inputs.reshape(1, n, 1), result, 0.0)
