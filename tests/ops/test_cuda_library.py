"""What can be said of the CUDA library without a GPU: messages, fake kernels, what was built."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash

from llmtrain import ops
from llmtrain.cli import diagnosis
from llmtrain.errors import EnvironmentFault
from llmtrain.ops import build_cuda, cuda
from llmtrain.ops.fakes import CUDA_FAKES, SWIGLU


def test_without_a_device_it_is_not_loaded() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert ops.cuda_fault() == "there is no CUDA device"


def test_fake_kernels_have_the_shapes_of_the_references() -> None:
    x = torch.randn(5, 7)
    for e5m2, dtype in ((False, ops.E4M3), (True, ops.E5M2)):
        y, t = ops.fp8_cast_transpose(x, dtype)
        pair = CUDA_FAKES["fp8_cast_transpose"](x.to("meta"), e5m2, 1.0)
        assert isinstance(pair, tuple)
        single = CUDA_FAKES["fp8_cast"](x.to("meta"), e5m2, 1.0)
        turned = CUDA_FAKES["fp8_transpose"](y.to("meta"))
        for fake, real in ((pair[0], y), (pair[1], t), (single, y), (turned, t)):
            assert isinstance(fake, torch.Tensor) and fake.dtype == real.dtype
            assert (fake.shape, fake.stride()) == (real.shape, real.stride())


def _alike(fakes: object, reals: object) -> None:
    assert isinstance(fakes, tuple) and isinstance(reals, tuple)
    for fake, real in zip(fakes, reals, strict=True):
        assert isinstance(fake, torch.Tensor) and fake.dtype == real.dtype
        assert (fake.shape, fake.stride()) == (real.shape, real.stride())


@pytest.mark.skipif(not ops.native_loaded(), reason="the compiled kernels are not built")
def test_fake_kernels_of_norms_and_activations_have_the_shapes_of_the_cpus() -> None:
    """Its operators have the same results, but for what is left out (keep)."""
    kernels = torch.ops.llmtrain
    x, w = torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
    far, w0 = x.to("meta"), w.to("meta")
    for layer, turned, branch in ((True, True, x), (False, False, None)):
        there = None if branch is None else far
        real = kernels.add_norm_cast(x, branch, w, None, 1e-5, layer, turned)
        fake = CUDA_FAKES["add_norm_cast"](far, there, w0, None, 1e-5, layer, turned, True)
        _alike(fake, real)
        lost = CUDA_FAKES["add_norm_cast"](far, there, w0, None, 1e-5, layer, turned, False)
        assert isinstance(lost, tuple) and lost[1].numel() == 0
        _alike(lost[2:], real[2:])
        real = kernels.norm_join_cast(x, x, w, None, 1e-5, layer, 0.5, turned)
        _alike(CUDA_FAKES["norm_join_cast"](far, far, w0, None, 1e-5, layer, 0.5, turned), real)
        for number in (0, SWIGLU):
            real = kernels.activation_cast(x, number, turned)
            _alike(CUDA_FAKES["activation_cast"](far, number, turned, True), real)
            dy = real[0]
            back = kernels.activation_backward_cast(dy, x, number, 2.0, turned)
            fake = CUDA_FAKES["activation_backward_cast"](dy.to("meta"), far, number, 2.0, turned)
            _alike(fake, back)
    pair = ops.fp8_weight(torch.randn(5, 7), torch.bfloat16)
    _alike(CUDA_FAKES["fp8_weight"](torch.empty(5, 7, device="meta")), pair)


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
    assert found is None or {*found.split()} <= {f"sm_{name}" for name in build_cuda.ARCHITECTURES}
    monkeypatch.setattr(cuda, "LIBRARY", Path("absent.so"))
    assert cuda.built_for() is None
    assert cuda.built_with_cublaslt() is None


def test_cublaslts_headers_are_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("CUBLAS_INCLUDE", str(tmp_path / "named"))
    for name in ("toolkit/include", "named"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "toolkit/include/cublasLt.h").touch()
    found = build_cuda.find_cublaslt()
    # A CUDA build of torch brings its own, which come before the toolkit's.
    assert found is not None and found != tmp_path / "named"
    (tmp_path / "named/cublasLt.h").touch()
    assert build_cuda.find_cublaslt() == tmp_path / "named"


def test_fewer_architectures_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_cuda.architectures() == build_cuda.ARCHITECTURES
    monkeypatch.setenv("LLMTRAIN_CUDA_ARCHITECTURES", "90a, 89")
    assert build_cuda.architectures() == ("90a", "89")
    monkeypatch.setenv("LLMTRAIN_CUDA_ARCHITECTURES", "70")
    with pytest.raises(EnvironmentFault, match="70 is none of 80, 89, 90a, 100"):
        build_cuda.architectures()


def test_the_doctor_says_who_sums_weight_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtrain.cli import diagnosis

    monkeypatch.setattr(cuda, "built_for", lambda: "sm_90a")
    monkeypatch.setattr(cuda, "load_fault", lambda: None)
    for version, fault, told in (
        ("13.1", None, "summed in the product (cuBLASLt 13.1)"),
        ("13.1", "libcublasLt.so.13 does not load", "the product: libcublasLt.so.13 does not load"),
        (None, None, "by torch after the product: built without cuBLASLt's headers"),
    ):
        monkeypatch.setattr(cuda, "built_with_cublaslt", lambda version=version: version)
        monkeypatch.setattr(cuda, "cublaslt_fault", lambda fault=fault: fault)
        assert told in diagnosis._cuda_kernels()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("empty", "damaged .*file too short"),
        ("text", "damaged .*invalid ELF header"),
        ("half", "damaged .*cut short"),  # the loader alone would end the process
        ("foreign", "is not llmtrain's library"),
    ],
)
def test_a_library_that_does_not_load_is_told_with_the_remedy(
    kind: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = Path(xxhash._xxhash.__file__).read_bytes()
    data = {"empty": b"", "text": b"no library\n" * 99, "half": whole[: len(whole) // 2]}
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / f"{kind}.so")
    cuda.LIBRARY.write_bytes(data.get(kind, whole))
    with pytest.raises(EnvironmentFault, match=rf"{says}.*run: python -m llmtrain.ops.build_cuda$"):
        diagnosis._cuda_kernels()
    # A run on GPUs says the same; what is foreign was loaded and has no operators.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said, first = (
        cuda.load_fault.__wrapped__(),
        says.split(" .*", maxsplit=1)[0].removeprefix("is "),
    )
    assert said is not None and re.search(f"^{first}.*build_cuda$", said)


@pytest.mark.parametrize(
    ("script", "says"),
    [("gpu_all", "finds no CUDA device"), ("sanitize_gpu", "no compute-sanitizer on the path")],
)
def test_scripts_for_a_gpu_say_at_once_what_is_missing(
    script: str, says: str, tmp_path: Path
) -> None:
    """And neither build nor write anything."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/dirname").symlink_to("/usr/bin/dirname")
    path = os.environ["PATH"] if script == "gpu_all" else str(tmp_path / "bin")
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    told = subprocess.run(
        ["/bin/bash", f"benchmarks/{script}.sh"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **hidden, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert told.returncode == 2 and says in told.stderr
    assert told.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_what_the_sanitizer_runs_is_there() -> None:
    """A test that was renamed would be left out silently."""
    root = Path(__file__).parents[2]
    checks = re.findall(
        r'check "\$tool" (\w+\.py) "(.+)"', (root / "benchmarks/sanitize_gpu.sh").read_text()
    )
    assert len(checks) == 3
    for file, words in checks:
        names = re.findall(r"def (test_\w+)", (root / "tests/gpu" / file).read_text())
        for word in words.split(" or "):
            # Of parameters: a kind of mask, and its product.
            assert any(word in name for name in [*names, "blocks-blocks"]), word
