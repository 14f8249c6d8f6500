from __future__ import annotations

import json

from reproml import environment


def test_describes_what_may_change_native_results(monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    described = environment.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["versions"]["torch"] and described["torch"]["threads"] >= 1
    assert described["variables"]["MKL_CBWR"] == "COMPATIBLE"
    assert "SECRET_TOKEN" not in described["variables"]


def test_the_cpu_is_read_from_cpuinfo(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name\t: A CPU @ 3 GHz: fast\nmodel name\t: other\n")
    assert environment._cpu(cpuinfo) == "A CPU @ 3 GHz: fast"
    cpuinfo.write_text("")
    assert environment._cpu(cpuinfo) == "unknown"
    assert environment._cpu(tmp_path / "none")


def test_a_package_that_is_not_there_is_said_to_be():
    assert environment._version("no-such-package-here") == "not installed"
