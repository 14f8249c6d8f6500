"""Describe this machine and its software. Each run records it, to explain differences between runs.

Nothing in it changes the result of an exact run. Everything in it may change that of a native run.
"""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from reproml.versions import __version__

_PACKAGES = ("torch", "numpy", "safetensors", "scikit-learn", "msgspec")

# Prefixes of environment variables that may change which kernels run, in which order they add, or how
# they round.
PREFIXES = (
    "ATEN_",
    "BLIS_",
    "CUBLAS_",
    "CUDA_",
    "GLIBC_TUNABLES",
    "GOMP_",
    "KMP_",
    "LD_PRELOAD",
    "MKL_",
    "NPY_",
    "OMP_",
    "ONEDNN_",
    "OPENBLAS_",
    "PYTORCH_",
    "REPROML_KERNELS",
    "TORCH_",
    "VECLIB_",
)

# The libraries with which PyTorch was built, as torch.__config__.show() names them.
_LIBRARIES = {
    "blas": r"BLAS_INFO=(\w+)",
    "lapack": r"LAPACK_INFO=(\w+)",
    "mkl_version": r"Math Kernel Library Version (\S+)",
    "onednn_version": r"MKL-DNN v(\S+)",
    "openmp": r"\(a\.k\.a\. OpenMP ([\d.]+)\)",
    "compiler": r"- ((?:GCC|clang) \S+)",
}


def describe() -> dict[str, Any]:
    """Return versions, machine, PyTorch's build and switches, and environment variables, as JSON."""
    import torch

    from reproml.arithmetic.compiler import kernels

    cudnn: Any = torch.backends.cudnn
    build = torch.__config__.show()
    return {
        "versions": versions(),
        "machine": {
            "system": platform.platform(),
            "architecture": platform.machine(),
            "cpu": _cpu(Path("/proc/cpuinfo")),
            "cpus": os.cpu_count(),
        },
        "torch": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "interop_threads": torch.get_num_interop_threads(),
            "mkl": torch.backends.mkl.is_available(),
            "commit": torch.version.git_version,
            "cuda": torch.version.cuda or "none",
            "gpu": _gpu(),
            **{name: _found(pattern, build) for name, pattern in _LIBRARIES.items()},
            "default_dtype": str(torch.get_default_dtype()),
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
            "cudnn_deterministic": cudnn.deterministic,
            "cudnn_benchmark": cudnn.benchmark,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        },
        "arithmetic": {"compiled_loops": kernels.library is not None},
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIXES)},
    }


def versions() -> dict[str, str]:
    """Return the versions of reproml, Python and the packages that it uses."""
    packages = {name: _version(name) for name in _PACKAGES}
    return {"reproml": __version__, "python": platform.python_version(), **packages}


def _gpu() -> str:
    """Return the name of the GPU, if this process has used one: to ask for it would occupy the GPU."""
    import torch

    if not torch.cuda.is_initialized():
        return "not used"
    return str(torch.cuda.get_device_name())


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu(cpuinfo: Path) -> str:
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor() or "unknown"
    fields = [[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]
    first = dict(reversed(fields))  # that of the first processor
    if "CPU part" in first and "model name" not in first:  # Arm gives codes in place of a name
        return f"Arm, implementer {first.get('CPU implementer')}, part {first['CPU part']}"
    return first.get("model name", "unknown")
