from __future__ import annotations

import json

import torch

from reproml import environment
from reproml.arithmetic.compiler import kernels


def test_describe_includes_relevant_variables_only(monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    described = environment.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["versions"]["torch"] and described["torch"]["threads"] >= 1
    assert described["variables"]["MKL_CBWR"] == "COMPATIBLE"
    assert "SECRET_TOKEN" not in described["variables"]


def test_describe_includes_build_and_switches(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: "as asked")
    monkeypatch.setattr(kernels, "library", None)
    text = (
        "BLAS_INFO=open, (a.k.a. OpenMP 5.1)\n - Intel(R) MKL-DNN v3.7.1 (Git Hash)\n - GCC 13.3\n"
    )
    monkeypatch.setattr(torch.__config__, "show", lambda: text)
    described = environment.describe()
    build = described["torch"]
    names = ("blas", "lapack", "mkl_version", "onednn_version", "openmp", "compiler")
    found = [build[name] for name in names]
    assert found == ["open", "unknown", "unknown", "3.7.1", "5.1", "GCC 13.3"]
    assert build["deterministic_algorithms"] == "as asked"
    assert described["arithmetic"] == {"compiled_loops": False}


def test_cpu_is_read_from_cpuinfo(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name\t: A CPU @ 3 GHz: fast\nmodel name\t: other\n")
    assert environment._cpu(cpuinfo) == "A CPU @ 3 GHz: fast"
    arm = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n\nCPU part\t: 0xd05\n"
    cpuinfo.write_text(arm)
    assert environment._cpu(cpuinfo) == "Arm, implementer 0x41, part 0xd0c"
    cpuinfo.write_text(arm + "model name\t: ARMv8 Processor rev 4\n")
    assert environment._cpu(cpuinfo) == "ARMv8 Processor rev 4"
    cpuinfo.write_text("")
    assert environment._cpu(cpuinfo) == "unknown"
    assert environment._cpu(tmp_path / "none")


def test_gpu_is_named_if_this_process_uses_it(monkeypatch):
    def busy() -> str:
        raise RuntimeError("all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "get_device_name", busy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert environment.describe()["torch"]["gpu"] == "not used"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert environment.describe()["torch"]["gpu"] == "NVIDIA H200"


def test_missing_package_is_reported():
    assert environment._version("no-such-package-here") == "not installed"
