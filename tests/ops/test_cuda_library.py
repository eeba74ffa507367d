"""What can be said of the CUDA library without a GPU: messages, fake kernels, what was built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmtrain import ops
from llmtrain.errors import EnvironmentFault
from llmtrain.ops import build_cuda, cuda


def test_without_a_device_it_is_not_loaded() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert ops.cuda_fault() == "there is no CUDA device"


def test_fake_kernels_have_the_shapes_of_the_references() -> None:
    x = torch.randn(5, 7)
    for e5m2, dtype in ((False, ops.E4M3), (True, ops.E5M2)):
        y, t = ops.fp8_cast_transpose(x, dtype)
        pair = cuda.FAKES["fp8_cast_transpose"](x.to("meta"), e5m2, 1.0)
        assert isinstance(pair, tuple)
        single = cuda.FAKES["fp8_cast"](x.to("meta"), e5m2, 1.0)
        turned = cuda.FAKES["fp8_transpose"](y.to("meta"))
        for fake, real in ((pair[0], y), (pair[1], t), (single, y), (turned, t)):
            assert isinstance(fake, torch.Tensor) and fake.dtype == real.dtype
            assert (fake.shape, fake.stride()) == (real.shape, real.stride())


def test_asking_for_the_library_breaks_no_graph() -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if cuda.ready() else x + 2

    x = torch.zeros(3)
    compiled = torch.compile(work, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), work(x))


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build_cuda.shutil, "which", lambda name: None)
    with pytest.raises(EnvironmentFault, match="no nvcc found; install the CUDA toolkit"):
        build_cuda.build(tmp_path / "_cuda.so")


def test_what_was_built_is_read_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cuda.built_for()
    assert found is None or found.split() == [f"sm_{name}" for name in build_cuda.ARCHITECTURES]
    monkeypatch.setattr(cuda, "LIBRARY", Path("absent.so"))
    assert cuda.built_for() is None
