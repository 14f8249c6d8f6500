"""What benchmarks.worst times: each operator on operands that it takes from one input of any length."""

from __future__ import annotations

from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ROW = 50  # length of the rows of softmax, normalization and the like

Case = Callable[[Tensor], Tensor]


def rows(x: Tensor) -> Tensor:
    return x.reshape(-1, ROW)


def images(x: Tensor) -> Tensor:
    return x[: x.numel() // 800 * 800].reshape(-1, 8, 10, 10)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    n = x.numel() // 2
    return x[:n], x[n : 2 * n]


def volumes(x: Tensor) -> Tensor:
    return x[: x.numel() // 1024 * 1024].reshape(-1, 4, 16, 4, 4)


def matrices(x: Tensor) -> Tensor:
    return x[: x.numel() // 64 * 64].reshape(-1, 8, 8)


def definite(x: Tensor) -> Tensor:
    m = matrices(x).clamp(-4, 4)
    return m @ m.mT + 9 * torch.eye(8)


def square(x: Tensor) -> Tensor:
    n = int(x.numel() ** 0.5)
    return x[: n * n].reshape(n, n)


def places(n: int, limit: int) -> Tensor:
    return torch.arange(n) * 7919 % limit


def conv(x: Tensor) -> Tensor:
    return F.conv2d(images(x), x[:576].reshape(8, 8, 3, 3), x[:8], padding=1)


def resized(mode: str, size: int = 15, antialias: bool = False) -> Case:
    return lambda x: F.interpolate(images(x), size=(size, size), mode=mode, antialias=antialias)


def sampled(mode: str) -> Case:
    def case(x: Tensor) -> Tensor:
        n = images(x).shape[0]
        return F.grid_sample(images(x), x[: n * 128].view(n, 8, 8, 2).clamp(-1, 1), mode=mode)

    return case


def sampled_volumes(x: Tensor) -> Tensor:
    n = volumes(x).shape[0]
    return F.grid_sample(volumes(x), x[: n * 192].view(n, 4, 4, 4, 3).clamp(-1, 1))


def ctc(x: Tensor) -> Tensor:
    n = x.numel() // 1000
    logs = x[: n * 1000].view(50, n, 20).log_softmax(2)
    labels = places(n * 10, 19).view(n, 10) + 1
    return F.ctc_loss(logs, labels, torch.full((n,), 50), torch.full((n,), 10))


def drawn(name: str, *arguments: Any) -> Case:
    return lambda x: getattr(torch.empty_like(x), name)(*arguments)


def created(name: str, *arguments: Any) -> Case:
    return lambda x: getattr(torch, name)(*arguments, x.numel())


def reduced(reduce: str) -> Case:
    return lambda x: torch.zeros(97).scatter_reduce(0, places(x.numel(), 97), x, reduce)


def stepped(optimizer: Any, **options: Any) -> Case:
    def case(x: Tensor) -> Tensor:
        p = x.detach().clone().requires_grad_()
        p.grad = x.detach().clone()
        optimizer([p], lr=0.5, fused=True, **options).step()
        return p.detach()

    return case


def target(x: Tensor) -> Tensor:
    return places(x.numel() // ROW, ROW)


CASES: dict[str, Case] = {
    "add": lambda x: torch.add(*halves(x), alpha=0.1),
    "sub": lambda x: halves(x)[0] - halves(x)[1],
    "mul": lambda x: halves(x)[0] * halves(x)[1],
    "div": lambda x: halves(x)[0] / halves(x)[1],
    "reciprocal": torch.reciprocal,
    "sqrt": lambda x: x.abs().sqrt(),
    "rsqrt": lambda x: x.abs().rsqrt(),
    "maximum": lambda x: torch.maximum(*halves(x)),
    "minimum": lambda x: torch.minimum(*halves(x)),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "amax, amin, max, min": lambda x: rows(x).amax(1) - rows(x).amin(1) + x.max() - x.min(),
    "addcmul": lambda x: torch.addcmul(*halves(x), halves(x)[1], value=0.1),
    "addcdiv": lambda x: torch.addcdiv(*halves(x), halves(x)[1], value=0.1),
    "lerp": lambda x: torch.lerp(*halves(x), 0.1),
    "pow, 3": lambda x: x**3,
    "pow, -2": lambda x: x**-2,
    "pow, 0.5": lambda x: x.abs() ** 0.5,
    "pow, 2.5": lambda x: x.abs() ** 2.5,
    "sum": torch.sum,
    "sum of rows": lambda x: rows(x).sum(1),
    "mean of columns": lambda x: rows(x).mean(0),
    "cumsum": lambda x: x.cumsum(0),
    "cumsum of rows": lambda x: rows(x).cumsum(1),
    "var": lambda x: rows(x).var(1),
    "std": lambda x: rows(x).std(1),
    "norm": lambda x: rows(x).norm(dim=1),
    "norm of all": torch.norm,
    "trace": lambda x: square(x).trace(),
    "scatter_add": lambda x: torch.zeros(97).scatter_add(0, places(x.numel(), 97), x),
    "index_add": lambda x: torch.zeros(97).index_add(0, places(x.numel(), 97), x),
    "x[index]": lambda x: x[places(x.numel(), 97)],
    "embedding": lambda x: F.embedding(places(x.numel() // ROW, 20), x[: 20 * ROW].view(20, ROW)),
    "unfold": lambda x: x.unfold(0, 4, 2),
    "pad, reflect": lambda x: F.pad(images(x), (1, 1, 1, 1), "reflect"),
    "pad, replicate": lambda x: F.pad(images(x), (1, 1, 1, 1), "replicate"),
    "upsample": lambda x: F.interpolate(images(x), scale_factor=2),
    "mm": lambda x: square(x) @ square(x),
    "bmm": lambda x: images(x)[:, 0] @ images(x)[:, 1],
    "mv": lambda x: square(x) @ square(x)[0],
    "dot": lambda x: torch.dot(*halves(x)),
    "linear": lambda x: F.linear(square(x), square(x), square(x)[0]),
    "conv2d": conv,
    "avg_pool2d": lambda x: F.avg_pool2d(images(x), 3, 1),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(images(x), 3),
    "max_pool2d": lambda x: F.max_pool2d(images(x), 3, 1),
    "batch_norm": lambda x: F.batch_norm(images(x), None, None, x[:8], x[:8], training=True),
    "layer_norm": lambda x: F.layer_norm(rows(x), (ROW,), x[:ROW], x[:ROW]),
    "group_norm": lambda x: F.group_norm(images(x), 2, x[:8], x[:8]),
    **{
        name: getattr(torch, name)
        for name in "exp expm1 log log1p sin cos tanh sigmoid erf erfc erfinv".split()
    },
    **{
        name: getattr(F, name)
        for name in "gelu silu softplus mish logsigmoid leaky_relu elu celu selu hardtanh "
        "hardsigmoid hardswish".split()
    },
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "prelu": lambda x: F.prelu(images(x), x[:8]),
    "softmax": lambda x: rows(x).softmax(1),
    "softmax of columns": lambda x: rows(x).softmax(0),
    "log_softmax": lambda x: rows(x).log_softmax(1),
    "logsumexp": lambda x: rows(x).logsumexp(1),
    "cross_entropy": lambda x: F.cross_entropy(rows(x), target(x)),
    "mse_loss": lambda x: F.mse_loss(*halves(x)),
    "smooth_l1_loss": lambda x: F.smooth_l1_loss(*halves(x)),
    "huber_loss": lambda x: F.huber_loss(*halves(x), delta=0.3),
    "binary_cross_entropy": lambda x: F.binary_cross_entropy(x.sigmoid(), x.sigmoid().detach()),
    "bce_with_logits": lambda x: F.binary_cross_entropy_with_logits(x, x.detach().sigmoid()),
    "xlogy": lambda x: torch.xlogy(halves(x)[0], halves(x)[1].abs()),
    "soft_margin_loss": lambda x: F.soft_margin_loss(halves(x)[0], halves(x)[1].sign().detach()),
    "glu": lambda x: F.glu(rows(x), 1),
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "threshold": lambda x: F.threshold(x, 0.1, 0.5),
    "hypot": lambda x: torch.hypot(*halves(x)),
    "log2, log10": lambda x: x.abs().log2() + x.abs().log10(),
    "exp2": torch.exp2,
    "tan": torch.tan,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "sinh, cosh": lambda x: x.sinh() + x.cosh(),
    "lgamma": torch.lgamma,
    "remainder": lambda x: torch.remainder(*halves(x)),
    "prod of rows": lambda x: rows(x).prod(1),
    "cumprod of rows": lambda x: rows(x).cumprod(1),
    "logcumsumexp": lambda x: rows(x)[:20].logcumsumexp(1),
    "max_unpool2d": lambda x: F.max_unpool2d(
        *F.max_pool2d(images(x), 2, return_indices=True), [2, 2]
    ),
    "embedding_bag": lambda x: F.embedding_bag(
        places(200, 20).view(20, 10), x[: 20 * ROW].view(20, ROW)
    ),
    "attention": lambda x: F.scaled_dot_product_attention(images(x), images(x), images(x)),
    # ---- one long row, which threads or lanes may not share ----
    "softmax of all": lambda x: x.softmax(0),
    "log_softmax of all": lambda x: x.log_softmax(0),
    "logsumexp of all": lambda x: x.logsumexp(0),
    "var of all": torch.var,
    "layer_norm of all": lambda x: F.layer_norm(x, x.shape),
    "prod of all": torch.prod,
    "cumprod of all": lambda x: x.cumprod(0),
    "logcumsumexp of all": lambda x: x.logcumsumexp(0),
    # ---- functions of one number or two ----
    **{
        name: getattr(torch, name)
        for name in "acos acosh angle asin atanh deg2rad frac i0 rad2deg round sinc".split()
    },
    **{
        name: getattr(torch.special, name)
        for name in "airy_ai bessel_j0 bessel_j1 digamma entr erfcx i0e i1 i1e log_ndtr logit "
        "modified_bessel_i0 modified_bessel_i1 ndtri spherical_bessel_j0".split()
    },
    "signbit": lambda x: x.signbit(),
    "frexp": lambda x: torch.frexp(x)[0],
    "polygamma": lambda x: torch.polygamma(2, x.abs() + 0.1),
    "mvlgamma": lambda x: torch.mvlgamma(x.abs() + 3, 3),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "clamp_max": lambda x: x.clamp_max(0.1),
    **{
        name: (lambda f: lambda x: f(*halves(x)))(getattr(torch, name))
        for name in "atan2 copysign dist floor_divide fmax fmin fmod logaddexp logaddexp2 "
        "nextafter vdot".split()
    },
    "rsub": lambda x: torch.rsub(*halves(x)),
    "xlog1py": lambda x: torch.special.xlog1py(*halves(x)),
    "pow of tensors": lambda x: halves(x)[0].abs() ** halves(x)[1].clamp(-3, 3),
    "pow of a number": lambda x: 2.5**x,
    # ---- reductions and selections ----
    "nansum": torch.nansum,
    "norm, 1": lambda x: rows(x).norm(1, dim=1),
    "norm, 3": lambda x: rows(x).norm(3, dim=1),
    "renorm": lambda x: rows(x).renorm(2, 0, 1.0),
    "var_mean, std_mean": lambda x: torch.var_mean(rows(x), 1)[0] + torch.std_mean(rows(x), 1)[0],
    "segment_reduce": lambda x: torch.segment_reduce(
        rows(x), "sum", lengths=torch.full((len(rows(x)) // 10,), 10)
    ),
    "aminmax": lambda x: torch.aminmax(x)[0],
    "kthvalue": lambda x: rows(x).kthvalue(7)[0],
    "median, nanmedian": lambda x: rows(x).median(1)[0] + rows(x).nanmedian(1)[0],
    "mode": lambda x: rows(x).mode(1)[0],
    "unique": torch.unique,
    "unique of rows": lambda x: torch.unique(rows(x), dim=0),
    "unique_consecutive": torch.unique_consecutive,
    "allclose": lambda x: torch.tensor(torch.allclose(*halves(x))),
    "histc": lambda x: torch.histc(x, 50),
    "histogram": lambda x: torch.histogram(x, 50)[0],
    "bincount": lambda x: torch.bincount(places(x.numel(), 97), weights=x),
    # ---- indices ----
    "index_put": lambda x: torch.zeros(97).index_put((places(x.numel(), 97),), x, accumulate=True),
    "put": lambda x: torch.zeros(97).put(places(x.numel(), 97), x, accumulate=True),
    "index_copy": lambda x: rows(x).index_copy(0, places(97, 101), rows(x)[:97]),
    "index_reduce": lambda x: torch.zeros(97).index_reduce(0, places(x.numel(), 97), x, "mean"),
    "scatter_reduce, mean": reduced("mean"),
    "scatter_reduce, prod": reduced("prod"),
    "scatter_reduce, amax": reduced("amax"),
    "renorm of embedding": lambda x: F.embedding(
        places(2000, len(rows(x))), rows(x).detach().clone(), max_norm=1.0
    ),
    # ---- windows, images and volumes ----
    "fold": lambda x: F.fold(x[: x.numel() // 900 * 900].view(-1, 9, 100), (10, 10), 3, padding=1),
    "pad of rows, reflect": lambda x: F.pad(rows(x), (1, 1), "reflect"),
    "pad of rows, replicate": lambda x: F.pad(rows(x)[None], (1, 1), "replicate"),
    "pad of volumes, reflect": lambda x: F.pad(volumes(x), (1,) * 6, "reflect"),
    "pad of volumes, replicate": lambda x: F.pad(volumes(x), (1,) * 6, "replicate"),
    "upsample, exact": resized("nearest-exact"),
    "upsample of rows": lambda x: F.interpolate(rows(x)[None], size=75),
    "upsample of rows, exact": lambda x: F.interpolate(
        rows(x)[None], size=75, mode="nearest-exact"
    ),
    "upsample of volumes": lambda x: F.interpolate(volumes(x), scale_factor=2),
    "upsample of volumes, exact": lambda x: F.interpolate(volumes(x), size=9, mode="nearest-exact"),
    "upsample, linear": lambda x: F.interpolate(images(x)[:, :, 0], size=15, mode="linear"),
    "upsample, bilinear": resized("bilinear"),
    "upsample, bicubic": resized("bicubic"),
    "upsample, trilinear": lambda x: F.interpolate(volumes(x), scale_factor=2, mode="trilinear"),
    "bilinear, antialias": resized("bilinear", 7, True),
    "bicubic, antialias": resized("bicubic", 7, True),
    "grid_sample": sampled("bilinear"),
    "grid_sample, bicubic": sampled("bicubic"),
    "grid_sample, nearest": sampled("nearest"),
    "grid_sample of volumes": sampled_volumes,
    "affine_grid": lambda x: F.affine_grid(x[:600].view(100, 2, 3), [100, 1, 10, 10], False),
    "avg_pool3d": lambda x: F.avg_pool3d(volumes(x), 2),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(volumes(x), 2),
    "max_pool3d": lambda x: F.max_pool3d(volumes(x), 2),
    "max_unpool3d": lambda x: F.max_unpool3d(
        *F.max_pool3d(volumes(x), 2, return_indices=True), [2, 2, 2]
    ),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(images(x), 3),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(volumes(x), 2),
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(images(x), 2, output_size=4),
    "fractional_max_pool3d": lambda x: F.fractional_max_pool3d(volumes(x), 2, output_size=2),
    "conv1d": lambda x: F.conv1d(images(x)[:, :, 0], x[:192].view(8, 8, 3)),
    "conv3d": lambda x: F.conv3d(volumes(x), x[:432].view(4, 4, 3, 3, 3), padding=1),
    "conv_transpose2d": lambda x: F.conv_transpose2d(images(x), x[:576].view(8, 8, 3, 3), stride=2),
    "conv2d, depthwise": lambda x: F.conv2d(images(x), x[:72].view(8, 1, 3, 3), groups=8),
    # ---- products of matrices ----
    "baddbmm": lambda x: torch.baddbmm(images(x)[:, 2], images(x)[:, 0], images(x)[:, 1]),
    "addbmm": lambda x: torch.addbmm(x[:100].view(10, 10), images(x)[:, 0], images(x)[:, 1]),
    "addmv": lambda x: torch.addmv(square(x)[1], square(x), square(x)[0]),
    "addr": lambda x: torch.addr(square(x), square(x)[1], square(x)[0]),
    "bilinear": lambda x: F.bilinear(
        rows(x)[:100], rows(x)[100:200], x[: 10 * ROW * ROW].view(10, ROW, ROW)
    ),
    "cdist": lambda x: torch.cdist(rows(x)[:200], rows(x)[200:400]),
    "pdist": lambda x: F.pdist(rows(x)[:200]),
    "cross": lambda x: torch.linalg.cross(
        *(h[: h.numel() // 3 * 3].view(-1, 3) for h in halves(x))
    ),
    "weight_norm": lambda x: torch._weight_norm_interface(rows(x), rows(x)[:, :1].contiguous(), 0)[
        0
    ],
    # ---- small matrices; kinds of input that are singular are left out ----
    "det": lambda x: torch.linalg.det(matrices(x)),
    "slogdet": lambda x: torch.linalg.slogdet(matrices(x))[1],
    "inv": lambda x: torch.linalg.inv(matrices(x)),
    "solve": lambda x: torch.linalg.solve(matrices(x)[::2], matrices(x)[::2].flip(1) + 1),
    "lu": lambda x: torch.linalg.lu(matrices(x))[2],
    "lu_factor, lu_solve": lambda x: torch.linalg.lu_solve(
        *torch.linalg.lu_factor(matrices(x)), matrices(x).flip(1)
    ),
    "cholesky": lambda x: torch.linalg.cholesky(definite(x)),
    "cholesky_solve": lambda x: torch.cholesky_solve(matrices(x), matrices(x).tril()),
    "cholesky_inverse": lambda x: torch.cholesky_inverse(matrices(x).tril()),
    "solve_triangular": lambda x: torch.linalg.solve_triangular(
        matrices(x).triu(), matrices(x), upper=True
    ),
    "triangular_solve": lambda x: torch.triangular_solve(matrices(x), matrices(x).triu())[0],
    "lstsq": lambda x: torch.linalg.lstsq(matrices(x)[..., :4], matrices(x)[..., 4:]).solution,
    "pinv": lambda x: torch.linalg.pinv(matrices(x)),
    "qr": lambda x: torch.linalg.qr(matrices(x)[0])[1],
    # ---- losses ----
    "ctc_loss": ctc,
    "nll_loss of images": lambda x: F.nll_loss(
        images(x), places(images(x).numel() // 8, 8).view(-1, 10, 10)
    ),
    "multi_margin_loss": lambda x: F.multi_margin_loss(rows(x), target(x)),
    "multilabel_margin_loss": lambda x: F.multilabel_margin_loss(
        rows(x), places(rows(x).numel(), ROW).view(-1, ROW)
    ),
    # ---- optimizers ----
    "SGD": stepped(torch.optim.SGD, momentum=0.5),
    "Adam": stepped(torch.optim.Adam),
    "AdamW": stepped(torch.optim.AdamW),
    # ---- random numbers and sequences; x gives their number, or probabilities ----
    "bernoulli": lambda x: torch.bernoulli(x.abs().clamp(0, 1)),
    "bernoulli_": drawn("bernoulli_", 0.3),
    "multinomial": lambda x: torch.multinomial(rows(x).abs().clamp(1e-30, 1e20), 3),
    "cauchy_": drawn("cauchy_"),
    "exponential_": drawn("exponential_"),
    "normal_": drawn("normal_"),
    "uniform_": drawn("uniform_"),
    "random_": drawn("random_"),
    "normal": lambda x: torch.normal(x, 1.0),
    "standard_gamma": lambda x: torch._standard_gamma(x.abs() + 0.1),
    "dirichlet": lambda x: torch._sample_dirichlet(rows(x).abs() + 0.1),
    "dropout": lambda x: F.dropout(x, 0.3),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "rand, rand_like": lambda x: torch.rand(x.numel()) + torch.rand_like(x),
    "randn, randn_like": lambda x: torch.randn(x.numel()) + torch.randn_like(x),
    "randint, randint_like": lambda x: torch.randint(9, x.shape) + torch.randint_like(x, 9),
    "randperm": created("randperm"),
    "linspace": created("linspace", 0.1, 0.7),
    "logspace": created("logspace", 0.1, 0.7),
    **{
        name: created(name)
        for name in "bartlett_window blackman_window hamming_window hann_window kaiser_window".split()
    },
}
