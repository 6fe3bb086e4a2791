"""What torch's compiler lacks is found before it is needed."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import pytest

from pocd.compute.toolchain import find_lack

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def include(tmp_path: Path) -> Path:
    (tmp_path / "Python.h").touch()
    return tmp_path


def with_compilers(folder: Path, *names: str) -> dict[str, str]:
    for name in names:
        (folder / name).touch(mode=0o755)
    return {"PATH": str(folder)}


def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())


def test_where_all_is_there_nothing_is_missed(include: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_triton(monkeypatch)
    environment = with_compilers(include, "gcc", "g++")
    for device in ("cpu", "cuda"):
        assert find_lack(device, environment, include=include, cache=include) is None


@pytest.mark.parametrize(("device", "there", "package"), [("cpu", "gcc", "g++"), ("cuda", "g++", "gcc")])
def test_each_device_needs_its_own_compiler(
    include: Path, monkeypatch: pytest.MonkeyPatch, device: str, there: str, package: str
) -> None:
    with_triton(monkeypatch)
    lack = find_lack(device, with_compilers(include, there), include=include, cache=include)
    assert lack is not None
    assert lack.remedy == f"install one (Debian: {package})"


def test_a_compiler_that_was_named_is_the_one_that_counts(include: Path) -> None:
    lack = find_lack("cpu", with_compilers(include, "g++") | {"CXX": "mine"}, include=include)
    assert lack is not None
    assert lack.text == "there is no C++ compiler (mine)"


def test_pythons_headers_are_needed_too(tmp_path: Path) -> None:
    lack = find_lack("cpu", with_compilers(tmp_path, "g++"), include=tmp_path)
    assert lack is not None
    assert (lack.text, "python3-dev" in lack.remedy) == (f"there is no {tmp_path / 'Python.h'}", True)


def test_a_cache_from_which_nothing_may_be_executed_is_told(include: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_triton(monkeypatch)
    real = os.statvfs(include)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*real[:8], os.ST_NOEXEC, *real[9:])))
    lack = find_lack("cuda", with_compilers(include, "gcc"), include=include, cache=include / "not" / "made")
    assert lack is not None
    assert lack.text == f"nothing in {include / 'not' / 'made'} may be executed: it is mounted noexec"
    assert "worker.cache" in lack.remedy


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="Triton is installed")
def test_a_torch_without_triton_compiles_for_no_gpu() -> None:
    lack = find_lack("cuda", os.environ)
    assert lack is not None
    assert lack.text.startswith("triton, ")
