"""What this machine is: recorded with each run, so that two runs can be told apart later.

Nothing here may change the result of an exact run. All of it may change a native one.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from reproml import __version__

_PACKAGES = ("torch", "numpy", "safetensors", "scikit-learn", "msgspec")

# Environment variables that change which kernels run, in which order they add, or how they round.
_PREFIXES = ("ATEN_", "CUBLAS_", "CUDA_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "OPENBLAS_", "TORCH_")


def describe() -> dict[str, Any]:
    """Return versions, machine, CPU capability, threads and the variables that matter, as JSON."""
    import torch

    return {
        "versions": {
            "reproml": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "machine": {
            "system": platform.platform(),
            "architecture": platform.machine(),
            "cpu": _cpu(Path("/proc/cpuinfo")),
            "cpus": os.cpu_count(),
        },
        "torch": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "mkl": torch.backends.mkl.is_available(),
        },
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_PREFIXES)},
    }


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
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"
