"""``make check-cuda``: the Python side of FP8 on CUDA, without a CUDA device.

Two micro-batches of small models run on tensors that have a shape, a dtype and the device "cuda"
but no memory; torch's own checks of shapes and layouts (``_scaled_mm``) and the fake kernels of our
operators see them all. What is counted is which operators are called how often, eager and
compiled, the latter in one graph for all blocks. Nothing is computed: numbers are for
`make test-gpu`. Needs a build of torch without CUDA, whose device csrc/check/no_device.cpp stands
for, and ``_cuda.so``.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def pretend(folder: Path) -> None:
    """Load the device in name; before torch is imported, which looks for it once."""
    found = find_spec("torch")
    assert found is not None and found.origin is not None
    torch_home, library = Path(found.origin).parent, folder / "no_device.so"
    links = ["-lc10", "-ltorch_cpu", f"-L{torch_home / 'lib'}", f"-Wl,-rpath,{torch_home / 'lib'}"]
    sources = [str(ROOT / "csrc/check/no_device.cpp"), f"-I{torch_home / 'include'}"]
    command = ["g++", "-std=c++20", "-O0", "-w", "-shared", "-fPIC", *sources, *links]
    subprocess.run([*command, "-o", str(library)], check=True)
    ctypes.CDLL(str(library))


def load_operators() -> None:
    """The operators and their fakes; their kernels stay unresolved and are not called."""
    import torch

    from llmtrain.ops import cuda, products
    from llmtrain.ops.fakes import CUDA_FAKES, register_fakes

    if not cuda.LIBRARY.exists():
        sys.exit(f"{cuda.LIBRARY} is {cuda.HELP.replace('run', 'not built; run')}")
    ctypes.CDLL(str(cuda.LIBRARY), mode=os.RTLD_LAZY)
    register_fakes("llmtrain_cuda", CUDA_FAKES)
    cuda.ready = lambda: True  # type: ignore[assignment]
    if hasattr(torch.ops.llmtrain_cuda, "fp8_wgrad_"):
        torch.library.register_fake("llmtrain_cuda::fp8_wgrad_", lambda *args: True)
        products.cublaslt_fault = lambda: None  # type: ignore[assignment]
    else:
        products.cublaslt_fault = lambda: "built without"  # type: ignore[assignment]


def calls(name: str, compiled: bool, mode: Any, **shape: Any) -> Counter[str]:
    """How often operators are called in two micro-batches (compiled: stand in the graphs of a
    block) of a model of two blocks with products in the format ``name``."""
    import torch
    from helpers.graphs import counting
    from torch.utils._python_dispatch import TorchDispatchMode

    from llmtrain.config.schema import LossConfig, ModelConfig
    from llmtrain.linear import fp8_matmul, summing_gradients
    from llmtrain.loss import head_loss
    from llmtrain.model import Decoder, compile_blocks, complete, hidden_layers

    names = Counter[str]()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            names[str(func)] += 1
            return func(*args, **(kwargs or {}))

    sizes = {"vocab_size": 1024, "d_model": 256, "n_layers": 2, "n_heads": 4, "d_ff": 512}
    cfg = complete(ModelConfig(**sizes, **shape), None, 64)
    torch._dynamo.reset()
    with mode, torch.autograd.set_multithreading_enabled(False):
        with torch.device("cuda"):
            model = Decoder(cfg, torch.bfloat16, None)
            tokens, ones = torch.zeros(2, 64, dtype=torch.int64), torch.ones(2, 64)
        for _, layer in hidden_layers(model):
            layer.set_matmul(fp8_matmul(name, torch.bfloat16, 64.0))
        if compiled:
            backend = counting(names)
            for block in model.blocks:
                block.compile = lambda b=block: setattr(  # type: ignore[method-assign]
                    b,
                    "_compiled_call_impl",
                    torch.compile(b._call_impl, backend=backend, fullgraph=True),
                )
            compile_blocks(model)

        def micro_batch() -> None:
            out = model(
                tokens,
                head_fn=lambda h, head: head_loss(h, head, tokens, ones, LossConfig(), 128.0),
            )
            with summing_gradients():
                out.loss.backward()

        for _ in range(2):
            if compiled:
                micro_batch()
            else:
                with Seen():
                    micro_batch()
    return names


def expect(what: str, found: Counter[str], **wanted: int) -> None:
    """The operators by their short names."""
    have = {key.split(".")[1]: n for key, n in found.items() if key.split(".")[0] in MINE}
    have = {key: n for key, n in have.items() if key in wanted or key in CASTS}
    assert have == {k: n for k, n in wanted.items() if n}, f"{what}: {have}, not {wanted}"
    print(f"{what}: {', '.join(f'{n} {k}' for k, n in sorted(have.items()))}")


MINE = ("llmtrain_cuda", "aten")
CASTS = (
    "add_norm_cast",
    "norm_join_cast",
    "activation_cast",
    "activation_backward_cast",
    "fp8_cast",
    "fp8_cast_transpose",
    "fp8_transpose",
    "fp8_weight",
    "fp8_wgrad_",
    "_scaled_mm",
)


def main() -> None:
    """Every combination that there is a path for."""
    with tempfile.TemporaryDirectory() as folder:
        pretend(Path(folder))
    import torch
    from torch._subclasses import FakeTensorMode

    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    from llmtrain.config.scaling import ScalingConfig

    load_operators()
    fused = hasattr(torch.ops.llmtrain_cuda, "fp8_wgrad_")
    mode = FakeTensorMode()
    pre: dict[str, Any] = {"activation": "swiglu"}
    post: dict[str, Any] = {"activation": "gelu", "norm": "layernorm"}
    post |= {"norm_placement": "post_branch", "scaling": ScalingConfig("mus", tau=0.3)}
    # Two micro-batches of two blocks with four products each, thrice; the second's weight
    # gradients are sums.
    products = {"_scaled_mm": 40 if fused else 48, "fp8_wgrad_": 8 if fused else 0}
    activations = {"activation_cast": 4, "activation_backward_cast": 4}
    expect(
        "pre-norm, SwiGLU, static",
        calls("mus_fp8", False, mode, **pre),
        **{**products, **activations, "add_norm_cast": 8, "fp8_weight": 8},
        fp8_cast_transpose=16,
    )
    expect(
        "post-norm, GELU, static",
        calls("mus_fp8", False, mode, **post),
        **{**products, **activations, "norm_join_cast": 4, "fp8_weight": 8},
        fp8_cast_transpose=20,
    )
    expect(
        "pre-norm, SwiGLU, one scale a tensor",
        calls("fp8_current", False, mode, **pre),
        **products,
        fp8_cast_transpose=40,
    )
    # One graph for both blocks, and no weight cast in it.
    activations = {"activation_cast": 1, "activation_backward_cast": 1}
    expect(
        "pre-norm, SwiGLU, static, compiled",
        calls("mus_fp8", True, mode, **pre),
        **{**activations, "add_norm_cast": 2, "_scaled_mm": 12},
        fp8_cast_transpose=5,
    )
    expect(
        "post-norm, GELU, static, compiled",
        calls("mus_fp8", True, mode, **post),
        **{**activations, "norm_join_cast": 1, "_scaled_mm": 12},
        fp8_cast_transpose=6,
    )
    print("FP8 on CUDA: the Python side calls what it should")


if __name__ == "__main__":
    main()
