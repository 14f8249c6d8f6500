"""What verification/walk.py calls: the namespaces, arguments for their callables, and what is left out.

The arguments of a function are PyTorch's own samples (op_db) and the same with larger tensors, or else
those of special() and tuples() with which it works natively. Modules take theirs from PyTorch's module_db
and by_hand(). All others have a recipe: a function of this file whose first argument is what it calls.
"""

from __future__ import annotations

import inspect
import math
import operator
import pickle
import re
import time
import typing
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice, zip_longest
from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch import distributions as dist
from torch.utils._pytree import tree_map

from verification import op_db
from verification.walk import Case, Cases, call, find, flatten, gradients, pattern, tensors

NAMESPACES = (
    "torch",
    "torch.foreach",
    "torch.Tensor",
    "torch.nn.functional",
    "torch.special",
    "torch.fft",
    "torch.linalg",
    "torch.distributions",
    "torch.func",
    "torch.optim",
    "torch.optim.lr_scheduler",
    "torch.optim.swa_utils",
    "torch.nn",
    "torch.nn.init",
    "torch.nn.utils",
    "torch.jit",
    "torch.export",
)
SAMPLES = 2  # of op_db and module_db, for each callable
FROM_TUPLES = 2  # calls of a callable for which there are no samples
SECONDS = 0.3  # of a call with larger operands
ELEMENTS = 6000  # of the largest operand, where its size is free

# What is not called, and why.
SKIPPED = {
    "changes the state of the process or of the thread": """
        set_.* use_deterministic_algorithms autocast_.*crement_nesting clear_autocast_cache seed
        init_num_threads prepare_multiprocessing_environment manual_seed share_memory_
        profiler_allow_cudagraph_cupti_lazy_reinit_cuda12 register_kl register_dataclass
        __setattr__ __delattr__ __init__ __setstate__ enable_onednn_fusion read_vitals""",
    "is the state of the process: an address, a seed, a name": """
        data_ptr initial_seed get_num_threads get_num_interop_threads __hash__ __dir__ __getattribute__
        __new__ __init_subclass__ __subclasshook__ __dlpack__ to_dlpack __array_wrap__ __delitem__
        storage untyped_storage __reduce__ __reduce_ex__ get_file_path""",
    "returns contents that are undefined": """
        empty empty_like empty_permuted empty_strided empty_quantized new_empty new_empty_strided
        resize resize_ resize_as resize_as_ new resize_as_sparse_ sparse_resize_
        sparse_resize_and_clear_""",
    "reads or writes files": """
        save load from_file export_opnames jit_module_from_flatbuffer save_jit_module_to_flatbuffer
        import_ir_module import_ir_module_from_buffer""",
    "needs a GPU or another device or library": """
        cudnn_.* miopen_.* cuda xpu ipu mtia hpu pin_memory is_pinned record_stream fbgemm_.*
        quantized_(batch_norm|gru|lstm|rnn).* fused_moving_avg_obs_fake_quant
        (ccol|col|crow|row)_indices_copy indices_copy native_norm to_padded_tensor RNNBase RNNCellBase
        factory_kwargs
        batch_norm_(stats|elemt|backward_.*|gather_stats.*|update_stats) to_mkldnn mkldnn_.*
        get_device_module DataParallel SyncBatchNorm""",
    "only raises: PyTorch has removed it, or has not implemented it": """
        align_tensors eig lstsq matrix_rank solve symeig reinforce storage_type""",
    "is a helper of PyTorch or Python, for types and dispatch": """
        Any Callable Literal Optional Union Self TypedDict Final ParamSpec TypeVar PARAM_LIST Iterable
        Iterator cast override wraps partial ref bisect_right deepcopy Counter SupportsFloat
        contextmanager isinstance annotate classproperty typename boolean_dispatch assert_int_or_pair
        handle_torch_function has_torch_function.* merge_type_from_type_comment parse_.*
        unify_type_list sym_.* range compiled_with_cxx11_abi __torch_dispatch__ __torch_function__
        __format__ compatibility Constraint FileLike FlattenFunc FromDumpableContextFn PassType
        ToDumpableContextFn UnflattenFunc interface set_module script_method is_scripting is_tracing
        ignore unused export dims debug_unwrap module_load register_hook
        register_post_accumulate_grad_hook""",
}
REASONS = {name: why for why, names in SKIPPED.items() for name in names.split()}


def skipped(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in REASONS)


# --- operands ------------------------------------------------------------------------------------


def data(*shape: int, scale: float = 4.0, seed: int = 1, grad: bool = True) -> Tensor:
    x = pattern(torch.zeros(shape), seed) * scale
    return x.requires_grad_(grad)


def integers(*shape: int, below: int = 6, seed: int = 1) -> Tensor:
    return ((data(*shape, scale=1, seed=seed, grad=False) + 0.5) * below).long()


def positive(*shape: int, seed: int = 1) -> Tensor:
    return (data(*shape, seed=seed, grad=False).abs() + 0.5).requires_grad_()


def unit(*shape: int, seed: int = 1) -> Tensor:
    return (data(*shape, scale=0.96875, seed=seed, grad=False) + 0.5).requires_grad_()


def tuples() -> list[tuple[Any, ...]]:
    """Return the operands that are tried for a function without samples, one after the other."""
    x, y, z = (data(60, 60, seed=s) for s in (1, 2, 3))
    v, w = data(3600, seed=4), data(3600, seed=5)
    p, u = positive(60, 60), unit(60, 60)
    i, j = integers(60, 60), integers(60, 60, seed=9) + 1
    b, image, volume = x.detach() > 0, data(2, 4, 20, 20), data(2, 4, 6, 8, 8)
    signal, spd = data(2, 4, 200), (x @ x.T + 400 * torch.eye(60)).detach()
    return [
        (x,), (x, y), (x, 2.0), (x, 1), (x, 0, 1), (x, y, z), (x, 0.5, 0.25), ([x, y],), (p,), (u,),
        (p, u), (u, u), (x, p), (x, b), (x, i), (x, 0, i), (x, 0, i, y), (x, i, y), (x, b, y), (b,), (b, b),
        (i,), (i, j), (i, 2), (v,), (v, w), (v, x, w), (x, v), (x, (60, 60)), (x, (0, 1)), (x, [60, 60], 0),
        (image,), (image, 2), (image, (2, 2)), (signal,), (signal, 2), (signal, 3, 2), (volume,),
        (volume, 2),
        (image, data(6, 4, 3, 3)), (signal, data(6, 4, 3)), (signal, data(6, 4, 3), data(6)), (spd,),
        (spd, x),
        (x, data(20, 60)), (x, y, data(20, 60, 60)), (x, y, data(20, 60, 60), data(20)), (x, 0.5),
        (x, 0.5, True),
        (x, 0.5, False), (x, 4, 1), (x, p, 4), (x, [30, 30]), (x, torch.float32), (x.detach() * 10,),
        (image, integers(2, 4, 20, 20)), (x, y, i.sign()[:, 0]), (x, y, z, 1.0), (64,), (8, 8), (8,),
        (0.0, 1.0, 50),
        (), (signal[0], data(4)), (image, None, None, data(4), positive(4), True, 0.1, 1e-5, False),
        (image, None, None, None, None, True, 0.1, 1e-5, False), (image, data(4), data(4),
        None, None, True, 0.1, 1e-5),
        (x, torch.tensor(0.5), torch.tensor(0.1)), (v, "float"), ([1.5, 2.5],), ("cpu",),
        (x.detach().numpy(),),
        (p, 0), (v, [60, 60]), (x, 3, 0, 1), (x, "a"), (x, ("a", "b")), (torch.float32, torch.int64),
        (x, "cpu"),
        (x, operator.neg), (x, y, operator.sub), (operator.neg, x),
    ]  # fmt: skip


def foreach_tuples() -> list[tuple[Any, ...]]:
    a, b, c = ([data(40, 60, seed=s), data(60, seed=s + 1)] for s in (1, 2, 3))
    p = [positive(40, 60), positive(60)]
    numbers = [0.3, 0.7]
    tensor = torch.tensor([0.3, 0.7])
    return [
        (p,), (a,), (a, b), (a, 0.3), (p, 0.3), (p, p), (a, numbers), (p, numbers), (a, torch.tensor(0.3)),
        (0.3, a),
        (a, b, c), (a, b, 0.3), (a, b, numbers), (a, b, p, 0.3), (a, b, p, numbers), (a, b, p, tensor),
    ]  # fmt: skip


# Operands of functions that take others than all of these.
def special() -> dict[str, list[tuple[Any, ...]]]:
    x, h, image = data(7, 5, 20), data(1, 5, 30), data(2, 4, 20, 20)

    def weights(gates: int) -> list[Tensor]:
        n = 30 * gates
        return [
            data(n, 20, scale=0.5),
            data(n, 30, scale=0.5, seed=2),
            data(n, seed=3),
            data(n, seed=4),
        ]

    row, state = x[0], h[0]
    csr = (torch.tensor([0, 2, 4]), torch.tensor([0, 1, 0, 1]), data(4))
    options = (True, 1, 0.0, True, False, False)
    quantized = torch.quantize_per_tensor(data(20, 20, grad=False), 0.1, 0, torch.quint8)
    zeros = torch.zeros(4, dtype=torch.int64)
    per_channel = torch.quantize_per_channel(
        data(4, 20, grad=False), positive(4).detach(), zeros, 0, torch.qint8
    )
    lengths = [torch.tensor([50] * 4), torch.tensor([30] * 4)]
    labels, gram = integers(4, 30, below=19) + 1, data(60, 60, grad=False)
    sparse = (data(20, 20, grad=False) > 1).float().to_sparse()
    complex_ = torch.complex(data(60), data(60, seed=2)).detach()
    blocks = (*csr[:2], data(4, 2, 2))
    return {
        "sparse_bsr_tensor": [blocks],
        "sparse_bsc_tensor": [blocks],
        "lstm": [(x, [h, h], weights(4), *options)],
        "gru": [(x, h, weights(3), *options)],
        "rnn_tanh": [(x, h, weights(1), *options)],
        "rnn_relu": [(x, h, weights(1), *options)],
        "lstm_cell": [(row, [state, state], *weights(4))],
        "gru_cell": [(row, state, *weights(3))],
        "rnn_tanh_cell": [(row, state, *weights(1))],
        "rnn_relu_cell": [(row, state, *weights(1))],
        "sparse_csr_tensor": [csr],
        "sparse_csc_tensor": [csr],
        "sparse_coo_tensor": [(torch.tensor([[0, 1], [1, 0]]), data(2), (2, 2))],
        "sparse_compressed_tensor": [(*csr, (2, 2), {"layout": torch.sparse_csr})],
        "affine_grid_generator": [(data(2, 2, 3), [2, 4, 20, 20], False)],
        "grid_sampler": [(image, data(2, 9, 9, 2, scale=2), m, 0, False) for m in (0, 1)],
        "grid_sampler_3d": [(data(1, 2, 5, 5, 5), data(1, 4, 4, 4, 3, scale=2), 0, 0, False)],
        "convolution": [(image, data(6, 4, 3, 3), data(6), [1, 1], [0, 0], [1, 1], False, [0, 0], 1)],
        "conv_tbc": [(data(9, 2, 4), data(3, 4, 5), data(5))],
        "ctc_loss": [(data(50, 4, 20).log_softmax(2), labels, *lengths)],
        "embedding_bag": [
            (data(100, 40), integers(500, below=100), torch.arange(0, 500, 10), False, m) for m in (0, 1)],
        "embedding_renorm_": [(data(100, 40, grad=False), integers(30, below=100), 1.0, 2.0)],
        "hinge_embedding_loss": [(data(60, 60), integers(60, 60).sign() * 2 - 1)],
        "native_group_norm": [(image, data(4), data(4), 2, 4, 400, 2, 1e-5)],
        "native_dropout": [(data(60, 60), 0.5, True)],
        "as_strided_": [(data(60, 60), (10, 10), (3, 2))],
        "frombuffer": [(bytearray(range(64)), {"dtype": torch.float32})],
        "cond": [(torch.tensor(True), torch.sin, torch.cos, (data(60),))],
        "while_loop": [(_more, _next, (torch.tensor(0), data(60, grad=False)))],
        "bincount": [(integers(3600),), (integers(3600), data(3600))],
        "quantize_per_tensor": [(data(20, 20), 0.1, 0, torch.quint8)],
        "quantize_per_channel": [(data(4, 20), positive(4), torch.zeros(4), 0, torch.qint8)],
        "quantize_per_tensor_dynamic": [(data(20, 20), torch.quint8, False)],
        "fake_quantize_per_tensor_affine": [(data(60, 60), 0.1, 0, 0, 255)],
        "fake_quantize_per_channel_affine": [(data(4, 20), positive(4), torch.zeros(4).int(), 0, 0, 255)],
        "choose_qparams_optimized": [(data(60, 60), 3600, 200, 0.16, 8)],
        "quantized_max_pool1d": [(torch.quantize_per_tensor(data(2, 3, 20), 0.1, 0, torch.quint8), [2])],
        "quantized_max_pool3d": [(torch.quantize_per_tensor(data(2, 3, 4, 6, 8), 0.1, 0, torch.quint8),
        [2, 2, 2])],
        "quantized_max_pool2d": [(torch.quantize_per_tensor(image, 0.1, 0, torch.quint8), [2, 2])],
        "imag": [(complex_,)],
        "view_as_real": [(complex_,)],
        "view_as_real_copy": [(complex_,)],
        "view_as_complex_copy": [(data(60, 2),)],
        "istft": [(torch.stft(data(900), 64, return_complex=True, window=torch.ones(64)).detach(), 64)],
        "is_nonzero": [(torch.tensor(0.5),)],
        **{f"__{x}__": [(torch.tensor(0.5),)] for x in "bool complex float int long nonzero".split()},
        "__index__": [(torch.tensor(5),)],
        "poisson_nll_loss": [(data(60, 60), data(60, 60, seed=2), True, False, 1e-8, 1)],
        "polygamma": [(1, positive(60, 60)), (positive(60, 60), 1)],
        "prelu": [(data(60, 60), torch.tensor([0.3], requires_grad=True))],
        "affine_grid": [(data(2, 2, 3), [2, 4, 20, 20], False)],
        "fold": [(data(2, 16, 196), (15, 15), 2)],
        "lp_pool3d": [(data(2, 4, 6, 8, 8), 2.0, 2)],
        "fractional_max_pool3d_with_indices": [(data(2, 4, 8, 8, 8), 2, 3)],
        "float_power_": [(data(60, 60, grad=False).double(), 1.3)],
        "calculate_gain": [("leaky_relu", 0.3)],
        "values_copy": [(sparse.to_sparse_csr(),)],
        "is_coalesced": [(sparse,)],
        "as_subclass": [(data(60, 60), nn.Parameter)],
        "segment_reduce": [(data(100), "sum", {"lengths": torch.tensor([60, 40])})],
        "int_repr": [(quantized,)],
        "dequantize": [(quantized,)],
        "q_scale": [(quantized,)],
        "q_zero_point": [(quantized,)],
        "qscheme": [(quantized,)],
        "q_per_channel_axis": [(per_channel,)],
        "q_per_channel_scales": [(per_channel,)],
        "q_per_channel_zero_points": [(per_channel,)],
        "coalesce": [(sparse,)],
        "indices": [(sparse.coalesce(),)],
        "values": [(sparse.coalesce(),)],
        "crow_indices": [(sparse.to_sparse_csr(),)],
        "col_indices": [(sparse.to_sparse_csr(),)],
        "ccol_indices": [(sparse.to_sparse_csc(),)],
        "row_indices": [(sparse.to_sparse_csc(),)],
        "smm": [(sparse, data(20, 20))],
        "dsmm": [(sparse, data(20, 20))],
        "hsmm": [(sparse, data(20, 20))],
        "hspmm": [(sparse, data(20, 20))],
        "spmm": [(sparse, data(20, 20))],
        "saddmm": [(sparse, sparse, data(20, 20))],
        "sspaddmm": [(sparse, sparse, data(20, 20))],
        "sparse_mask": [(data(20, 20), sparse)],
        "gumbel_softmax": [(data(60, 60),)],
        "kaiser_window": [(50,)],
        "__contains__": [(data(60), 0.5)],
        "__setitem__": [(data(60), 3, 0.5)],
        "__deepcopy__": [(data(60), {})],
        "type": [(data(60), torch.float32)],
        "new_tensor": [(data(60), [0.1, 0.2])],
        "map_": [(data(60, grad=False), data(60, grad=False), operator.mul)],
        "map2_": [(data(60, grad=False), data(60, grad=False), data(60, grad=False), _weighted)],
        "apply_": [(data(60, grad=False), abs)],
        "lobpcg": [(gram @ gram.T + torch.eye(60) * 100,)],
    }  # fmt: skip


def _more(n: Tensor, x: Tensor) -> Tensor:
    return n < 3


def _next(n: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return n + 1, x.sin()


def _weighted(x: float, y: float, z: float) -> float:
    return x + y * z


def larger(tree: Any) -> Iterator[Any]:
    """Yield a sample with larger tensors: all sizes times a number, and only the first sizes of all."""
    given = tensors(tree)
    largest = max([x.numel() for x in given], default=0)
    if not 0 < largest < ELEMENTS // 2 or any(x.layout is not torch.strided for x in given):
        return
    for only_first in (False, True):
        for factor in (256, 64, 16, 8, 4, 2):
            sizes = [
                [
                    n * factor if n > 1 and not (only_first and d) else n
                    for d, n in enumerate(x.shape)
                ]
                for x in given
            ]
            together = [
                max(n) for n in zip_longest(*(s[::-1] for s in sizes), fillvalue=1)
            ]  # broadcast
            if max(math.prod(s) for s in sizes) <= ELEMENTS and math.prod(together) < 10**7:
                drawn = iter([_drawn_from(x, s, i) for i, (x, s) in enumerate(zip(given, sizes))])
                yield tree_map(lambda x: next(drawn) if isinstance(x, Tensor) else x, tree)  # noqa: B023
                break


def _drawn_from(x: Tensor, shape: list[int], seed: int) -> Tensor:
    """Return a larger tensor, with elements of x, or numbers between them if they are floating-point."""
    if not x.numel():
        return x
    index = integers(*shape, below=x.numel(), seed=seed)
    y = x.detach().flatten()[index]
    if x.dtype is torch.float32 and x.numel() > 1:
        low, high = float(y.min()), float(y.max())
        between = low + (data(*shape, scale=1, seed=seed, grad=False) + 0.5) * (high - low)
        y = torch.where(between.isfinite(), between, y)
    return y.requires_grad_(x.requires_grad)


# --- recipes: each is a function that walk.py calls, and the arguments for it ----------------------

HERE = "verification.walk_cases"
Recipes = dict[str, list[Case]]


# ---- distributions

DISTRIBUTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "Bernoulli": lambda x, u, p: dist.Bernoulli(u),
    "Bernoulli logits": lambda x, u, p: dist.Bernoulli(logits=x),
    "Beta": lambda x, u, p: dist.Beta(p, u + 1),
    "Binomial": lambda x, u, p: dist.Binomial(10, u),
    "Binomial logits": lambda x, u, p: dist.Binomial(10, logits=x),
    "Categorical": lambda x, u, p: dist.Categorical(u),
    "Categorical logits": lambda x, u, p: dist.Categorical(logits=x),
    "Cauchy": lambda x, u, p: dist.Cauchy(x, p),
    "Chi2": lambda x, u, p: dist.Chi2(p),
    "ContinuousBernoulli": lambda x, u, p:
        dist.ContinuousBernoulli(u * 0.4),  # near 1/2 PyTorch's formula cancels
    "Dirichlet": lambda x, u, p: dist.Dirichlet(p),
    "Exponential": lambda x, u, p: dist.Exponential(p),
    "FisherSnedecor": lambda x, u, p: dist.FisherSnedecor(p, p + 1),
    "Gamma": lambda x, u, p: dist.Gamma(p, u + 1),
    "GeneralizedPareto": lambda x, u, p: dist.GeneralizedPareto(x, p, u),
    "Geometric": lambda x, u, p: dist.Geometric(u),
    "Geometric logits": lambda x, u, p: dist.Geometric(logits=x),
    "Gumbel": lambda x, u, p: dist.Gumbel(x, p),
    "HalfCauchy": lambda x, u, p: dist.HalfCauchy(p),
    "HalfNormal": lambda x, u, p: dist.HalfNormal(p),
    "Independent": lambda x, u, p: dist.Independent(dist.Normal(x, p), 1),
    "InverseGamma": lambda x, u, p: dist.InverseGamma(p, u + 1),
    "Kumaraswamy": lambda x, u, p: dist.Kumaraswamy(p, u + 1),
    "LKJCholesky": lambda x, u, p: dist.LKJCholesky(3, p[0, :5]),
    "Laplace": lambda x, u, p: dist.Laplace(x, p),
    "LogNormal": lambda x, u, p: dist.LogNormal(x, p),
    "LogisticNormal": lambda x, u, p: dist.LogisticNormal(x, p),
    "LowRankMultivariateNormal": lambda x, u, p: dist.LowRankMultivariateNormal(x, x[:, :, None] * 0.5, p),
    "MixtureSameFamily": lambda x, u, p: dist.MixtureSameFamily(dist.Categorical(u), dist.Normal(x, p)),
    "Multinomial": lambda x, u, p: dist.Multinomial(10, u),
    "MultivariateNormal": lambda x, u, p: dist.MultivariateNormal(x[0], scale_tril=p[0].diag_embed()),
    "NegativeBinomial": lambda x, u, p: dist.NegativeBinomial(10, u),
    "Normal": lambda x, u, p: dist.Normal(x, p),
    "OneHotCategorical": lambda x, u, p: dist.OneHotCategorical(u),
    "OneHotCategoricalStraightThrough": lambda x, u, p: dist.OneHotCategoricalStraightThrough(u),
    "Pareto": lambda x, u, p: dist.Pareto(p, u + 1),
    "Poisson": lambda x, u, p: dist.Poisson(p),
    "RelaxedBernoulli": lambda x, u, p: dist.RelaxedBernoulli(p[0, 0], u),
    "RelaxedOneHotCategorical": lambda x, u, p: dist.RelaxedOneHotCategorical(p[0, 0], u),
    "StudentT": lambda x, u, p: dist.StudentT(p + 2, x, p),
    "TransformedDistribution": lambda x, u, p:
        dist.TransformedDistribution(dist.Normal(x, p), dist.TanhTransform()),
    "Uniform": lambda x, u, p: dist.Uniform(x, x + p),
    "VonMises": lambda x, u, p: dist.VonMises(x, p),
    "Weibull": lambda x, u, p: dist.Weibull(p, u + 1),
    "Wishart": lambda x, u, p: dist.Wishart(p[0, 0] + 9, scale_tril=p[0, :4].diag_embed()),
}  # fmt: skip
METHODS = "sample rsample log_prob entropy cdf icdf mean variance stddev mode perplexity enumerate_support"

TRANSFORMS: dict[str, Callable[[], Any]] = {
    "AbsTransform": dist.AbsTransform,
    "AffineTransform": lambda: dist.AffineTransform(0.3, 1.7),
    "CatTransform": lambda: dist.CatTransform([dist.ExpTransform(), dist.TanhTransform()], 0, [20, 20]),
    "ComposeTransform": lambda:
        dist.ComposeTransform([dist.ExpTransform(), dist.AffineTransform(1.0, 2.0)]),
    "CorrCholeskyTransform": dist.CorrCholeskyTransform,
    "CumulativeDistributionTransform": lambda: dist.CumulativeDistributionTransform(dist.Normal(0.0, 1.0)),
    "ExpTransform": dist.ExpTransform,
    "IndependentTransform": lambda: dist.IndependentTransform(dist.ExpTransform(), 1),
    "LowerCholeskyTransform": dist.LowerCholeskyTransform,
    "PositiveDefiniteTransform": dist.PositiveDefiniteTransform,
    "PowerTransform": lambda: dist.PowerTransform(torch.tensor(0.5)),
    "ReshapeTransform": lambda: dist.ReshapeTransform(torch.Size([15]), torch.Size([3, 5])),
    "SigmoidTransform": dist.SigmoidTransform,
    "SoftmaxTransform": dist.SoftmaxTransform,
    "SoftplusTransform": dist.SoftplusTransform,
    "StackTransform": lambda: dist.StackTransform([dist.ExpTransform(), dist.TanhTransform()] * 20, 0),
    "StickBreakingTransform": dist.StickBreakingTransform,
    "TanhTransform": dist.TanhTransform,
    "identity_transform": lambda: dist.identity_transform,
}  # fmt: skip
CONSTRAINTS: dict[str, Callable[[], Any]] = {
    "real": lambda: dist.constraints.real,
    "positive": lambda: dist.constraints.positive,
    "unit_interval": lambda: dist.constraints.unit_interval,
    "interval": lambda: dist.constraints.interval(-0.3, 1.7),
    "greater_than": lambda: dist.constraints.greater_than(0.3),
    "less_than": lambda: dist.constraints.less_than(0.3),
    "simplex": lambda: dist.constraints.simplex,
    "lower_cholesky": lambda: dist.constraints.lower_cholesky,
    "corr_cholesky": lambda: dist.constraints.corr_cholesky,
}


def distribution(name: str, method: str, *operands: Tensor) -> Any:
    """Call a method of a distribution, or evaluate a property."""
    *parameters, value = operands
    found = getattr(DISTRIBUTIONS[name](*parameters), method)
    if not callable(found):
        return found
    takes_value = method in ("log_prob", "cdf", "icdf")
    return found(value) if takes_value else found((5,)) if "sample" in method else found()


def divergence(p: str, q: str, *operands: Tensor) -> Any:
    x, u, y = operands
    return dist.kl_divergence(
        DISTRIBUTIONS[p](x, u, y), DISTRIBUTIONS[q](x * 0.5, u * 0.5, y + 0.5)
    )


def transform(name: str, method: str, x: Tensor) -> Any:
    """Transform, there and back."""
    t = TRANSFORMS[name]()
    if method == "there":
        return t(x)
    y = t(x).detach()
    return t.inv(y) if method == "back" else t.log_abs_det_jacobian(x, y)


def constrained(kind: str, name: str, x: Tensor) -> Any:
    return getattr(dist, kind)(CONSTRAINTS[name]())(x)


def distribution_recipes() -> Iterator[tuple[str, Case]]:
    x, u, p = data(40, 15), unit(40, 15), positive(40, 15)
    for title, make in DISTRIBUTIONS.items():
        torch.manual_seed(0)
        sample = make(x, u, p).sample()
        for method in METHODS.split():
            value = unit(*sample.shape, seed=5) if method == "icdf" else sample
            yield (
                title.split()[0],
                Case(f"{HERE}.distribution", (title, method, x, u, p, value), {}),
            )
    for a in DISTRIBUTIONS:
        for b in DISTRIBUTIONS:
            yield "kl_divergence", Case(f"{HERE}.divergence", (a, b, x, u, p), {})
    for name in TRANSFORMS:
        for method in ("there", "back", "jacobian"):
            yield name, Case(f"{HERE}.transform", (name, method, x), {})
            yield name, Case(f"{HERE}.transform", (name, method, data(40, 15, 15)), {})
    for name in CONSTRAINTS:
        for kind in ("biject_to", "transform_to"):
            yield kind, Case(f"{HERE}.constrained", (kind, name, data(40, 15)), {})
            yield kind, Case(f"{HERE}.constrained", (kind, name, data(9, 15, 15)), {})


# ---- models, optimizers, schedulers


class Model(nn.Module):
    """Two layers with fixed parameters."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(30, 40), nn.BatchNorm1d(40), nn.Linear(40, 10)
        fill(self, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))  # type: ignore[no-any-return]


def fill(module: Any, dtype: torch.dtype) -> Any:
    """Give a module parameters that do not depend on random numbers."""
    module.to(dtype)
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            if not isinstance(p, nn.parameter.UninitializedParameter):
                p.copy_(pattern(p, i + 3) * 0.5)
    return module


OPTIMIZERS: dict[str, list[dict[str, Any]]] = {
    "ASGD": [{}, {"foreach": True}],
    "Adadelta": [{}, {"foreach": True}, {"weight_decay": 0.1, "maximize": True}],
    "Adafactor": [{}],
    "Adagrad": [{}, {"foreach": True}, {"lr_decay": 0.1, "weight_decay": 0.1}, {"fused": True}],
    "Adam": [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True, "weight_decay": 0.1},
        {"capturable": True}],
    "AdamW": [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}],
    "Adamax": [{}, {"foreach": True}],
    "LBFGS": [{}, {"line_search_fn": "strong_wolfe"}],
    "NAdam": [{}, {"foreach": True}],
    "RAdam": [{}, {"foreach": True}],
    "RMSprop": [{}, {"foreach": True}, {"centered": True, "momentum": 0.9}],
    "Rprop": [{}, {"foreach": True}],
    "SGD": [{}, {"foreach": True}, {"fused": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}],
    "SparseAdam": [{}],
}  # fmt: skip


def optimizer(name: str, options: dict[str, Any], x: Tensor) -> Any:
    """Do three steps; return the parameters and the state."""
    model = fill(nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 10)), x.dtype)
    made = getattr(torch.optim, name)(model.parameters(), lr=0.01, **options)

    def loss() -> Tensor:
        made.zero_grad()
        value: Tensor = (model(x.detach()) ** 2).mean()
        value.backward()
        if name == "SparseAdam":
            for p in model.parameters():
                p.grad = p.grad.to_sparse() if p.grad is not None else None
        return value

    with torch.enable_grad():
        for _ in range(3):
            loss()
            made.step(loss) if name == "LBFGS" else made.step()
    return [model, [list(s.values()) for s in made.state.values()]]


SCHEDULERS: dict[str, list[tuple[Any, ...]]] = {
    "ConstantLR": [()],
    "CosineAnnealingLR": [(7,), (7, 0.001)],
    "CosineAnnealingWarmRestarts": [(3,), (3, 2)],
    "CyclicLR": [(0.001, 0.1, 3), (0.001, 0.1, 3, 2, "triangular2"), (0.001, 0.1, 3, 2, "exp_range", 0.99)],
    "ExponentialLR": [(0.97,)],
    "LinearLR": [()],
    "MultiStepLR": [([3, 7], 0.3)],
    "OneCycleLR": [(0.1, 25), (0.1, 25, None, None, 0.3, "linear")],
    "PolynomialLR": [(15, 0.7), (15, 2)],
    "ReduceLROnPlateau": [("min", 0.3, 1)],
    "StepLR": [(3, 0.3)],
    "LambdaLR": [(lambda e: 1 / (1 + e),)],
    "MultiplicativeLR": [(lambda e: 0.95,)],
    "ChainedScheduler": [()],
    "SequentialLR": [()],
    "SWALR": [(0.05, 5), (0.05, 5, "linear")],
}  # fmt: skip


def scheduler(name: str, number: int, optimizer: str) -> Any:
    """Do 20 steps; return the learning rates and momenta."""
    made: Any = getattr(torch.optim, optimizer)([torch.zeros(3, requires_grad=True)], lr=0.03)
    optim: Any = torch.optim.lr_scheduler
    if name in ("ChainedScheduler", "SequentialLR"):
        parts = [optim.ExponentialLR(made, 0.97), optim.PolynomialLR(made, 15, 0.7)]
        more = () if name == "ChainedScheduler" else ([5],)
        s = getattr(optim, name)(made, parts, *more) if more else optim.ChainedScheduler(parts)
    else:
        owner = torch.optim.swa_utils if name == "SWALR" else optim
        s = getattr(owner, name)(made, *SCHEDULERS[name][number])
    rates = []
    for step in range(20):
        made.step()
        s.step(1.0 + step % 3) if name == "ReduceLROnPlateau" else s.step()
        group = made.param_groups[0]
        rates += [group["lr"], group.get("momentum"), group.get("betas")]
    return rates


def averaged(average: str, x: Tensor) -> Any:
    """Average the parameters of a model over three steps, and update its batch norms."""
    swa = torch.optim.swa_utils
    model = Model(x.dtype)
    options = {
        "swa": {},
        "swa multi": {"multi_avg_fn": swa.get_swa_multi_avg_fn()},
        "ema": {"avg_fn": swa.get_ema_avg_fn(0.93)},
        "ema multi": {"multi_avg_fn": swa.get_ema_multi_avg_fn(0.93)},
        "swa single": {"avg_fn": swa.get_swa_avg_fn()},
        "buffers": {"use_buffers": True},
    }[average]
    mean = swa.AveragedModel(model, **options)
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        with torch.enable_grad():
            model(x.detach()).square().mean().backward()
        made.step()
        mean.update_parameters(model)
    swa.update_bn([x.detach()], mean)
    return mean


def optimizer_recipes() -> Iterator[tuple[str, Case]]:
    x = data(50, 30)
    for name, options in OPTIMIZERS.items():
        for few in options:
            yield f"torch.optim.{name}", Case(f"{HERE}.optimizer", (name, few, x), {})
    for name, arguments in SCHEDULERS.items():
        for number in range(len(arguments)):
            for optimizer_name in ("SGD", "Adam"):
                full = f"torch.optim.{'swa_utils' if name == 'SWALR' else 'lr_scheduler'}.{name}"
                yield full, Case(f"{HERE}.scheduler", (name, number, optimizer_name), {})
    for average, name in {
        "swa": "AveragedModel",
        "buffers": "update_bn",
        "ema": "get_ema_avg_fn",
        "ema multi": "get_ema_multi_avg_fn",
        "swa single": "get_swa_avg_fn",
        "swa multi": "get_swa_multi_avg_fn",
    }.items():
        yield f"torch.optim.swa_utils.{name}", Case(f"{HERE}.averaged", (average, x), {})


# ---- modules


def module(name: str, arguments: Any, training: bool, args: Any, kwargs: Any) -> Any:
    """Make a module, give it fixed parameters, and return its output and its parameters' gradients."""
    given, named = arguments
    dtype = next((x.dtype for x in tensors(args) if x.is_floating_point()), torch.float32)
    made = fill(find(name)(*given, **named), dtype).train(training)
    result = made(*args, **kwargs)
    fill(made, dtype) if "Lazy" in name else None
    with torch.no_grad():
        values = list(flatten(result))
    if not torch.is_grad_enabled():
        return [values, made]
    return [values, gradients(values, list(made.parameters())), list(made.buffers())]


def initialized(name: str, arguments: Any) -> Any:
    """Make a module, and return its parameters."""
    given, named = arguments
    return find(name)(*given, **named)


def by_hand() -> dict[str, list[tuple[tuple[Any, ...], tuple[Any, ...]]]]:
    """Return modules that module_db lacks, or has only small ones of: constructor and operands."""
    x, image, signal, volume = (
        data(50, 60),
        data(3, 8, 14, 14),
        data(3, 8, 200),
        data(2, 4, 6, 8, 8),
    )
    long, target = data(9, 6, 40), integers(50, below=60)
    logs, labels = data(50, 4, 20).log_softmax(2), integers(4, 30, below=19) + 1
    lengths = [torch.tensor([50] * 4), torch.tensor([30] * 4)]
    pooled = [nn.functional.max_pool1d(data(2, 4, 20), 2, return_indices=True)]
    pooled += [nn.functional.max_pool2d(image, 2, return_indices=True)]
    pooled += [nn.functional.max_pool3d(volume, 2, return_indices=True)]
    maxima = [(v.detach(), i) for v, i in pooled]
    return {
        "AdaptiveLogSoftmaxWithLoss": [((60, 60, [10, 30]), (x, target))],
        "AlphaDropout": [((0.3,), (x,))], "FeatureAlphaDropout": [((0.3,), (image,))],
        "Dropout": [((0.3,), (x,))], "Dropout1d": [((0.3,), (signal,))], "Dropout2d": [((0.3,), (image,))],
        "Dropout3d": [((0.3,), (volume,))], "ChannelShuffle": [((2,), (image,))], "Flatten": [((),
        (image,))],
        "CosineSimilarity": [((), (x, data(50, 60, seed=7)))], "CrossMapLRN2d": [((3,), (image,))],
        "EmbeddingBag": [((60, 30), (target.reshape(10, 5),)), ((60, 30, 1.0), (target.reshape(10, 5),))],
        "Fold": [(((15, 15), 2), (data(2, 4 * 4, 14 * 14),))], "Unfold": [((3,), (image,))],
        "Hardsigmoid": [((), (x,))], "Identity": [((), (x,))], "PairwiseDistance": [((),
        (x, data(50, 60, seed=8)))],
        "LazyBatchNorm1d": [((), (x,))], "LazyBatchNorm2d": [((), (image,))], "LazyBatchNorm3d": [((),
        (volume,))],
        "LazyInstanceNorm1d": [((), (signal,))], "LazyInstanceNorm2d": [((), (image,))],
        "LazyInstanceNorm3d": [((), (volume,))], "LazyLinear": [((30,), (x,))],
        "MaxUnpool1d": [((2,), maxima[0])], "MaxUnpool2d": [((2,), maxima[1])], "MaxUnpool3d": [((2,),
        maxima[2])],
        "PixelShuffle": [((2,), (image,))], "PixelUnshuffle": [((2,), (image,))], "RReLU": [((), (x,))],
        "TripletMarginLoss": [((), (x, data(50, 60, seed=2), data(50, 60, seed=3)))],
        "TripletMarginWithDistanceLoss": [((), (x, data(50, 60, seed=2), data(50, 60, seed=3)))],
        "Unflatten": [((1, (6, 10)), (x,))], "Upsample": [((None, 2.0, m),
        (image,)) for m in ("nearest", "bilinear")],
        "UpsamplingBilinear2d": [((None, 2), (image,))], "UpsamplingNearest2d": [((None, 2), (image,))],
        "NLLLoss2d": [((), (image, integers(3, 14, 14)))],
        "Linear": [((60, 40), (x,))], "Bilinear": [((60, 60, 9), (x, x))], "Embedding": [((60, 50),
        (target,))],
        "Conv1d": [((8, 9, 5), (signal,))], "Conv2d": [((8, 9, 3), (image,)), ((8, 8, 3, 2, 1, 1, 4),
        (image,))],
        "Conv3d": [((4, 5, 3), (volume,))], "ConvTranspose1d": [((8, 9, 5), (signal,))],
        "ConvTranspose2d": [((8, 9, 3, 2), (image,))], "ConvTranspose3d": [((4, 5, 3), (volume,))],
        "BatchNorm1d": [((60,), (x,))], "BatchNorm2d": [((8,), (image,))], "GroupNorm": [((4, 8),
        (image,))],
        "LayerNorm": [((60,), (x,))], "RMSNorm": [((60,), (x,))], "InstanceNorm2d": [((8,), (image,))],
        "LSTM": [((40, 30, 2), (long,))], "GRU": [((40, 30, 2), (long,))], "RNN": [((40, 30, 2), (long,))],
        "LSTMCell": [((60, 30), (x,))], "GRUCell": [((60, 30), (x,))], "RNNCell": [((60, 30), (x,))],
        "MultiheadAttention": [((40, 4), (long, long, long))], "TransformerEncoderLayer": [((40, 4, 60),
        (long,))],
        "TransformerDecoderLayer": [((40, 4, 60), (long, long))],
        "Transformer": [((40, 4, 1, 1, 60), (long, long))],
        "TransformerDecoder": [((nn.TransformerDecoderLayer(40, 4, 60), 1), (long, long))],
        "CTCLoss": [((), (logs, labels, *lengths))],
        "Sequential": [((nn.Linear(60, 40), nn.GELU(), nn.Linear(40, 30)), (x,))],
        "CrossEntropyLoss": [((), (x, target)), ((None, None, -100, None, "mean", 0.1), (x, target))],
    }  # fmt: skip


def module_recipes() -> Iterator[tuple[str, Case]]:
    from torch.testing._internal.common_modules import module_db

    for name, few in by_hand().items():
        for arguments, args in few:
            for training in (True, False):
                yield (
                    name,
                    Case(
                        f"{HERE}.module",
                        (f"torch.nn.{name}", (arguments, {}), training, args, {}),
                        {},
                    ),
                )
            yield name, Case(f"{HERE}.initialized", (f"torch.nn.{name}", (arguments, {})), {})
    for info in module_db:
        name = info.module_cls.__name__
        for training in (True, False):
            torch.manual_seed(0)
            given = info.module_inputs_func(info, "cpu", torch.float32, True, training)
            given = [x for x in given if x.forward_input is not None]
            for x in given[:: max(1, len(given) // SAMPLES)]:
                arguments = (x.constructor_input.args, x.constructor_input.kwargs)
                operands = [x.forward_input.args, x.forward_input.kwargs]
                more = [] if re.search("RNN|GRU|LSTM|Transformer", name) else larger(operands)
                for args, kwargs in [operands, *more]:
                    yield (
                        name,
                        Case(
                            f"{HERE}.module",
                            (f"torch.nn.{name}", arguments, training, args, kwargs),
                            {},
                        ),
                    )


# ---- torch.func, torch.nn.utils, torch.jit, torch.export


def f(x: Tensor) -> Tensor:
    return (x.tanh() * x).exp().mean(-1)


def g(x: Tensor) -> Tensor:
    return f(x).sum()


FUNC: dict[str, Callable[[Tensor], Any]] = {
    "grad": lambda x: torch.func.grad(g)(x),
    "grad_and_value": lambda x: torch.func.grad_and_value(g)(x),
    "hessian": lambda x: torch.func.hessian(g)(x[0]),
    "jacfwd": lambda x: torch.func.jacfwd(f)(x),
    "jacrev": lambda x: torch.func.jacrev(f)(x),
    "jvp": lambda x: torch.func.jvp(f, (x,), (x * 0.3,)),
    "linearize": lambda x: torch.func.linearize(f, x)[1](x * 0.3),
    "vjp": lambda x: torch.func.vjp(f, x)[1](x[:, 0]),
    "vmap": lambda x: [
        torch.func.vmap(f)(x),
        torch.func.vmap(torch.func.grad(g))(x),
        torch.func.vmap(torch.dot)(x, x * 0.3),
        torch.func.vmap(lambda y: y.softmax(0) @ y, chunk_size=7)(x),
        torch.func.vmap(torch.nn.functional.dropout, randomness="different")(x),
    ],
    "functional_call": lambda x: torch.func.functional_call(Model(x.dtype), {"last.bias": x[0, :10]}, (x,)),
    "functionalize": lambda x: torch.func.functionalize(lambda y: y.clone().exp_().sum(1))(x),
    "replace_all_batch_norm_modules_": lambda x:
        torch.func.replace_all_batch_norm_modules_(Model(x.dtype))(x),
    "stack_module_state": lambda x: _stacked(Model(x.dtype).eval(), x),
}  # fmt: skip


def _stacked(model: Any, x: Tensor) -> Any:
    def apply(parameters: Any, buffers: Any) -> Any:
        return torch.func.functional_call(model, (parameters, buffers), (x,))

    return torch.vmap(apply)(*torch.func.stack_module_state([model, model]))


def _trained(model: Any, x: Tensor) -> Any:
    """Return the gradients of a model as well, as its parameters are its own."""
    with torch.enable_grad():
        y = model(x)
        return [y, gradients(y, list(model.parameters())), model]


def _with_gradients(x: Tensor) -> list[Tensor]:
    parameters = [torch.zeros_like(y, requires_grad=True) for y in (x, x[0])]
    for p, y in zip(parameters, (x, x[0])):
        p.grad = y.detach().clone()
    return parameters


def _clipped(x: Tensor, name: str, *args: Any, **kwargs: Any) -> Any:
    parameters = _with_gradients(x)
    result = getattr(nn.utils, name)(parameters, *args, **kwargs)
    return [result, [p.grad for p in parameters]]


def _pruned(x: Tensor, name: str, **kwargs: Any) -> Any:
    import torch.nn.utils.prune as prune

    return _trained(getattr(prune, name)(fill(nn.Linear(30, 40), x.dtype), "weight", **kwargs), x)


def _linear(x: Tensor) -> Any:
    return fill(nn.Linear(30, 40), x.dtype)


def _conv_bn(x: Tensor) -> Any:
    return fill(nn.Sequential(nn.Conv1d(1, 8, 3), nn.BatchNorm1d(8)), x.dtype).eval()


def _linear_bn(x: Tensor) -> Any:
    return fill(nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40)), x.dtype).eval()


def _orthogonal(x: Tensor, map_name: str) -> Any:
    return _trained(nn.utils.parametrizations.orthogonal(_linear(x), orthogonal_map=map_name), x)


def _packed(x: Tensor) -> Any:
    lengths = torch.arange(x.shape[0], 0, -1).clamp(max=x.shape[1])
    packed = nn.utils.rnn.pack_padded_sequence(x[:, :, None], lengths, batch_first=True)
    return [nn.utils.rnn.pad_packed_sequence(packed), fill(nn.GRU(1, 8), x.dtype)(packed)]


def _fused_weights(x: Tensor) -> Any:
    c, b = _conv_bn(x)
    return nn.utils.fuse_conv_bn_weights(
        c.weight, c.bias, b.running_mean, b.running_var, b.eps, b.weight, b.bias
    )


def _fused_linear_weights(x: Tensor) -> Any:
    c, b = _linear_bn(x)
    return nn.utils.fuse_linear_bn_weights(
        c.weight, c.bias, b.running_mean, b.running_var, b.eps, b.weight, b.bias
    )


def _assigned(x: Tensor) -> Any:
    model = _linear(x)
    nn.utils.vector_to_parameters(pattern(torch.zeros(1240), 5).to(x.dtype), model.parameters())
    return model(x)


UTILS: dict[str, Callable[[Tensor], Any]] = {
    "clip_grad_norm": lambda x: _clipped(x, "clip_grad_norm", 0.7),
    "clip_grad_norm_": lambda x: [
        _clipped(x, "clip_grad_norm_", 0.7, n, foreach=e)
        for n in (2.0, 1.0, float("inf")) for e in (None, True, False)
    ],
    "clip_grad_value_": lambda x:
        [_clipped(x, "clip_grad_value_", 0.7, foreach=e) for e in (None, True, False)],
    "clip_grads_with_norm_": lambda x: _clipped(x, "clip_grads_with_norm_", 0.7, x.new_tensor(3.7)),
    "get_total_norm": lambda x: nn.utils.get_total_norm([x, x[0]]),
    "convert_conv2d_weight_memory_format": lambda x: nn.utils.convert_conv2d_weight_memory_format(
        fill(nn.Conv2d(1, 4, 3), x.dtype), torch.channels_last)(x[None, None]),
    "convert_conv3d_weight_memory_format": lambda x: nn.utils.convert_conv3d_weight_memory_format(
        fill(nn.Conv3d(1, 4, (1, 3, 3)), x.dtype), torch.channels_last_3d),
    "fuse_conv_bn_eval": lambda x: nn.utils.fuse_conv_bn_eval(*_conv_bn(x))(x[:, None]),
    "fuse_conv_bn_weights": _fused_weights,
    "fuse_linear_bn_eval": lambda x: nn.utils.fuse_linear_bn_eval(*_linear_bn(x))(x),
    "fuse_linear_bn_weights": _fused_linear_weights,
    "parameters_to_vector": lambda x: nn.utils.parameters_to_vector([x, x[0]]),
    "vector_to_parameters": _assigned,
    "skip_init": lambda x: fill(nn.utils.skip_init(nn.Linear, 30, 40), x.dtype)(x),
    "spectral_norm": lambda x: _trained(nn.utils.spectral_norm(_linear(x)), x),
    "remove_spectral_norm": lambda x: nn.utils.remove_spectral_norm(nn.utils.spectral_norm(_linear(x))),
    "weight_norm": lambda x: _trained(nn.utils.weight_norm(_linear(x)), x),
    "remove_weight_norm": lambda x: nn.utils.remove_weight_norm(nn.utils.weight_norm(_linear(x))),
    "parametrizations.weight_norm": lambda x:
        _trained(nn.utils.parametrizations.weight_norm(_linear(x)), x),
    "parametrizations.spectral_norm": lambda x:
        _trained(nn.utils.parametrizations.spectral_norm(_linear(x)), x),
    "parametrizations.orthogonal": lambda x: _orthogonal(x, "householder"),
    "parametrizations.orthogonal cayley": lambda x: _orthogonal(x, "cayley"),
    "parametrizations.orthogonal exp": lambda x: _orthogonal(x, "matrix_exp"),
    "parametrize.register_parametrization": lambda x: _trained(
        _parametrized(_linear(x), "weight", nn.Softplus()), x),
    "rnn.pack_padded_sequence": _packed,
    "rnn.pad_sequence": lambda x: nn.utils.rnn.pad_sequence([x[0], x[1, :9], x[2, :4]]),
    "rnn.pack_sequence": lambda x: nn.utils.rnn.pack_sequence([x[:9, :3], x[:4, :3]]),
    "rnn.unpad_sequence": lambda x: nn.utils.rnn.unpad_sequence(x[:, :4], torch.tensor([9, 5, 3, 1])),
    "rnn.unpack_sequence": lambda x:
        nn.utils.rnn.unpack_sequence(nn.utils.rnn.pack_sequence([x[:9], x[:4]])),
    "stateless.functional_call": lambda x: nn.utils.stateless.functional_call(
        Model(x.dtype), {"last.bias": x[0, :10]}, (x,)),
    "prune.l1_unstructured": lambda x: _pruned(x, "l1_unstructured", amount=0.3),
    "prune.ln_structured": lambda x: _pruned(x, "ln_structured", amount=0.3, n=2, dim=0),
    "prune.random_unstructured": lambda x: _pruned(x, "random_unstructured", amount=0.3),
    "prune.random_structured": lambda x: _pruned(x, "random_structured", amount=0.3, dim=0),
    "prune.identity": lambda x: _pruned(x, "identity"),
}  # fmt: skip


def _parametrized(model: Any, name: str, by: Any) -> Any:
    nn.utils.parametrize.register_parametrization(model, name, by)
    return model


def _mean_of_wave(x: Tensor) -> Tensor:
    """A function that PyTorch's compilers can fuse, with a branch and a loop."""
    y = torch.sigmoid(x) * torch.tanh(x) + torch.exp(x)
    if bool(y.sum() > 0):
        for _ in range(2):
            y = torch.sin(y) * 0.7 + x
    return torch.softmax(y, -1).mean(0) + torch.dropout(y, 0.3, True).sum(0)


def _often(function: Any, x: Tensor) -> Any:
    """Call it several times, as PyTorch's JIT compiles after it has seen two calls."""
    results = []
    for _ in range(4):
        with torch.enable_grad():
            y = function(x)
        results.append([y, gradients(y, [x]) if x.requires_grad else []])
    return results


def _forked(x: Tensor) -> Tensor:
    y: Tensor = torch.jit.wait(torch.jit.fork(_mean_of_wave, x))
    return y * x


def _fused(x: Tensor, name: str) -> Any:
    with torch.jit.fuser(name):  # type: ignore[attr-defined]
        return _often(torch.jit.script(_mean_of_wave), x)


def _optimized(x: Tensor) -> Any:
    frozen = torch.jit.optimize_for_inference(torch.jit.script(Model(x.dtype).eval()))
    with torch.no_grad():
        return [frozen(x.detach()) for _ in range(4)]


def _frozen(x: Tensor) -> Any:
    frozen = torch.jit.freeze(torch.jit.script(Model(x.dtype).eval()))
    torch.jit.run_frozen_optimizations(frozen)  # type: ignore[attr-defined]
    with torch.no_grad():
        return [frozen(x.detach()) for _ in range(4)]


def _unoptimized(x: Tensor) -> Any:
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        return _often(torch.jit.script(_mean_of_wave), x)


JIT: dict[str, Callable[[Tensor], Any]] = {
    "script": lambda x: [_often(torch.jit.script(_mean_of_wave), x),
        _often(torch.jit.script(Model(x.dtype)), x)],
    "trace": lambda x: [
        _often(torch.jit.trace(f, x), x),
        _often(torch.jit.trace(Model(x.dtype), x.detach(), check_trace=False), x),
    ],
    "trace_module": lambda x:
        _often(torch.jit.trace_module(Model(x.dtype).eval(), {"forward": x.detach()}), x),
    "script_if_tracing": lambda x: torch.jit.script_if_tracing(_mean_of_wave)(x),
    "freeze": _frozen,
    "run_frozen_optimizations": _frozen,
    "optimize_for_inference": _optimized,
    "fork": lambda x: _often(torch.jit.script(_forked), x),
    "wait": lambda x: _often(_forked, x),
    "fuser": lambda x: [_fused(x, name) for name in ("fuser0", "fuser1", "fuser3")],
    "optimized_execution": _unoptimized,
    "strict_fusion": lambda x: _often(torch.jit.script(f), x),
    "last_executed_optimized_graph": lambda x: _often(torch.jit.script(f), x),
    "ScriptModule": lambda x: torch.jit.script(nn.Linear(30, 40).to(x.dtype)).forward(x) * 0,
    "CompilationUnit": lambda x: torch.jit.CompilationUnit(
        "def f(x):\n  return x.exp().sum(0) / (x * x + 1).sqrt()[0]\n").f(x),
}  # fmt: skip


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = Model(dtype).eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.model(x), -1).cumsum(0) * torch.rsqrt(x.square().mean() + 1)


def _exported(x: Tensor, name: str) -> Any:
    program = getattr(torch.export, name)(Block(x.dtype), (x.detach(),))
    simple = program.run_decompositions()
    return [p.module()(x) for p in (program, simple)] + [torch.export.unflatten(program)(x)]


EXPORT: dict[str, Callable[[Tensor], Any]] = {
    "export": lambda x: _exported(x, "export"),
    "export_for_training": lambda x: _exported(x, "export_for_training"),
    "draft_export": lambda x: _exported(x, "draft_export"),
    "unflatten": lambda x: _exported(x, "export"),
    "default_decompositions": lambda x: [
        function(x) for operator, function in torch.export.default_decompositions().items()
        if str(operator) in ("aten.elu.default", "aten.hardsigmoid.default", "aten.trace.default")
    ],
}  # fmt: skip


def _backward(x: Tensor) -> Any:
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        f(leaf).backward(pattern(x[:, 0]))
    return leaf.grad


def _aligned(x: Tensor) -> Any:
    """Align tensors with names; these cannot be sent to another process."""
    a, b = x[:6, :6].rename("a", "b"), x[6:12, :6].rename("b", "a")
    return [a.align_as(b), a.align_to("b", "a")]


def _qr(name: str, x: Tensor) -> Any:
    """Return Q and R, with a positive diagonal of R as exact() defines it."""
    q, r = find(name)(x[:30] + 10 * torch.eye(30, dtype=x.dtype))
    sign = r.detach().diagonal().sign()
    return [q * sign, r * sign[:, None]]


RECIPES: dict[str, dict[str, Callable[[Tensor], Any]]] = {
    "torch.func": FUNC,
    "torch.nn.utils": UTILS,
    "torch.jit": JIT,
    "torch.export": EXPORT,
    "torch": {
        # It then draws the random numbers of eager mode.
        "compile": lambda x: _often(
            torch.compile(_mean_of_wave, options={"fallback_random": True}), x
        ),
        "vmap": lambda x: torch.vmap(f)(x),
        "fork": lambda x: torch._C.fork(f, x).wait(),
        "wait": lambda x: torch._C.wait(torch._C.fork(f, x)),
        "qr": lambda x: _qr("torch.qr", x),
    },
    "torch.linalg": {"qr": lambda x: _qr("torch.linalg.qr", x)},
    "torch.Tensor": {
        "backward": _backward,
        "align_as": _aligned,
        "align_to": _aligned,
        "qr": lambda x: _qr("torch.Tensor.qr", x),
    },
}


def recipe(namespace: str, name: str, x: Tensor) -> Any:
    return RECIPES[namespace][name](x)


# --- all cases -----------------------------------------------------------------------------------


def recipes() -> Recipes:
    """Return the cases of all recipes, by the name of the callable."""
    made: Recipes = {}
    for name, case in distribution_recipes():
        made.setdefault(f"torch.distributions.{name}", []).append(case)
    for name, case in optimizer_recipes():
        made.setdefault(name, []).append(case)
    for name, case in module_recipes():
        made.setdefault(f"torch.nn.{name}", []).append(case)
    for namespace, few in RECIPES.items():
        for name in few:
            case = Case(f"{HERE}.recipe", (namespace, name, data(50, 30)), {})
            made.setdefault(f"{namespace}.{name.split()[0]}", []).append(case)
    return made


def callables(namespace: str, with_recipe: Iterable[str]) -> list[str]:
    """Return the full names of what is called in a namespace."""
    if namespace == "torch.foreach":
        return [f"torch.{x}" for x in dir(torch) if x.startswith("_foreach_")]
    owner, found = find(namespace), {x for x in with_recipe if _namespace_of(x) == namespace}
    for name in dir(owner):
        full, value = f"{namespace}.{name}", getattr(owner, name, None)
        public = not name.startswith("_") or (owner is torch.Tensor and name.startswith("__"))
        if not public or not callable(value) or skipped(name) or typing.get_origin(value):
            continue
        if not inspect.isclass(value) or (namespace == "torch.nn" and issubclass(value, nn.Module)):
            found.add(full)
    return sorted(found)


def _namespace_of(name: str) -> str:
    return max((x for x in NAMESPACES if name.startswith(x + ".")), key=len)


def sampled(name: str, operators: dict[str, Any]) -> Iterator[Case]:
    """Yield a function's samples of op_db, and larger ones."""
    base = re.sub("^torch\\.(Tensor\\.)?", "", name)
    op = operators.get(base) or operators.get(base.rstrip("_"))
    if op is None or base.startswith("__"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        samples = [x for x, _ in islice(op_db.samples(op), 80)]
    for x in samples[:: max(1, len(samples) // SAMPLES)]:
        operands = [(x.input, *x.args), x.kwargs]
        for args, kwargs in [operands, *larger(operands)]:
            sizes = {v.numel() for v in tensors(args[1:])}
            if "batch_norm" in name and sizes - {args[0].shape[1]}:
                continue  # PyTorch takes weights that are too long
            yield Case(name, tuple(args), kwargs)


def generic(name: str, bank: list[tuple[Any, ...]], named: dict[str, Any]) -> Iterator[Case]:
    short = name.rpartition(".")[2]
    if name.startswith("torch._foreach_"):
        bank = foreach_tuples()
    for args in named.get(short, bank):
        options = (
            args[-1] if args and short != "__deepcopy__" and isinstance(args[-1], dict) else {}
        )
        yield Case(name, args[: len(args) - bool(options)], options)


def valid(cases: Iterable[Case], most: int) -> Iterator[Case]:
    """Yield the calls that work natively, with gradients if they can be computed, and the first without."""
    found = 0
    for case in cases:
        wanted = [grad for grad in (True, False) if _works(case._replace(grad=grad))]
        found += bool(wanted)
        yield from [case._replace(grad=grad) for grad in wanted[: 2 if found == 1 else 1]]
        if found == most:
            return


def _works(case: Case) -> bool:
    """Return whether a call works natively, takes little time, and can be sent to another process."""
    start = time.process_time()
    try:
        call(case)
        pickle.dumps(case)
    except Exception:
        return False
    return time.process_time() - start < SECONDS or case.function.startswith(HERE)


def make(names: list[str], step: int = 1) -> tuple[Cases, dict[str, str]]:
    """Return the cases of each callable, and each one's namespace.

    names: of callables or namespaces; all if empty. step: take one callable of so many."""
    operators: dict[str, Any] = {}
    for op in op_db.operators():
        for name in (op.name, *(x.name for x in op.aliases)):
            operators.setdefault(name, op)
    by_recipe, bank, named = recipes(), tuples(), special()
    cases: Cases = {}
    namespaces: dict[str, str] = {}
    for namespace in NAMESPACES:
        for name in callables(namespace, by_recipe)[::step]:
            if names and not {name, namespace} & set(names):
                continue
            namespaces[name] = namespace
            if name in by_recipe:
                cases[name] = list(valid(by_recipe[name], 1000))
                continue
            cases[name] = list(valid(sampled(name, operators), 2 * SAMPLES))
            if not cases[name]:
                cases[name] = list(valid(generic(name, bank, named), FROM_TUPLES))
    return cases, namespaces
