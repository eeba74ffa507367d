"""``llmtrain merge`` refuses what it would have to ignore, and values that are no numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.cli.main import main
from llmtrain.merge import blocks, offline

NAME = "model.layers.0.mlp.up_proj.weight"
Refused = pytest.CaptureFixture[str]


def tensors(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (11, 6), NAME: (9, 6)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def write(folder: Path, values: dict[str, Tensor]) -> str:
    """A Hugging Face folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    return {name: write(tmp_path / name, tensors(i)) for i, name in enumerate(("base", "a", "b"))}


def refused(models: dict[str, str], line: str, capfd: Refused) -> str:
    """The one sentence on standard error; nothing was written."""
    folder = Path(models["a"]).parent
    before = set(folder.iterdir())
    words = [word.format(**models) for word in line.split()]
    assert main(["merge", *words, "--out", str(folder / "out")]) == 2
    assert set(folder.iterdir()) == before
    return capfd.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("soup {a} {b} models.1.weight=-1", "weights sum to 0"),
        ("soup {a} {b} models.0.weight=0 models.1.weight=0", "weights sum to 0"),
        ("linear {a} {b} {base} models.0.weight=0.1 models.1.weight=0.2 models.2.weight=-0.3",
         "weights sum to 0"),
        ("fisher {a} {b} models.1.weight=-1", "models.1.weight: fisher needs at least 0"),
        ("fisher {a} {b} models.0.weight=0 models.1.weight=0", "weights sum to 0"),
        ("greedy-soup {a} {b} models.1.weight=0", "models.1.weight: greedy-soup needs more than 0"),
        ("task-arithmetic {a} {b} --base {base} models.1.weight=-1 normalize=true",
         "weights sum to 0"),
        ("dare {a} {b} --base {base} models.1.weight=-1 normalize=true", "weights sum to 0"),
    ],
)  # fmt: skip
def test_weights_that_cancel(models: dict[str, str], line: str, says: str, capfd: Refused) -> None:
    assert says in refused(models, line, capfd)


def test_weights_that_cancel_are_summed_where_nothing_is_divided(
    tmp_path: Path, models: dict[str, str]
) -> None:
    out = tmp_path / "out"
    line = ["merge", "soup", models["a"], models["b"], "models.1.weight=-1", "normalize=false"]
    assert main([*line, "--out", str(out)]) == 0
    one, two = tensors(1), tensors(2)
    for name, value in load_file(out / "model.safetensors").items():
        wanted = one[name].double() - two[name].double()
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "line",
    [
        "linear {a} {bad}",
        "ties {bad} {b} --base {base} density=0.5",
        "slerp {a} --base {bad}",
        "model-stock {a} {bad} --base {base}",
        "fisher {a} {bad} models.0.fisher={a} models.1.fisher={b}",
        "fisher {a} {b} models.0.fisher={a} models.1.fisher={bad}",
    ],
)
def test_inputs_that_are_no_numbers_are_named(
    tmp_path: Path,
    models: dict[str, str],
    bad: float,
    line: str,
    capfd: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 7)
    values = tensors(3)
    values[NAME].view(-1)[-1] = bad
    models["bad"] = write(tmp_path / "bad", values)
    said = refused(models, line, capfd)
    assert f"{NAME} in {tmp_path / 'bad' / 'model.safetensors'} holds values" in said


def test_large_numbers_whose_sum_overflows_are_numbers(
    tmp_path: Path, models: dict[str, str]
) -> None:
    large = {name: torch.full_like(value, 3e38) for name, value in tensors(3).items()}
    big = write(tmp_path / "big", large)
    line = ["merge", "wise-ft", big, "--base", models["a"], "beta=0", "--out"]
    assert main([*line, str(tmp_path / "out")]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, large[name]) for name, value in merged.items())


def test_a_result_that_overflows_is_refused(models: dict[str, str], capfd: Refused) -> None:
    line = "task-arithmetic {a} --base {base} scale=1e6 dtype=fp16"
    said = refused(models, line, capfd)
    assert (
        "is NaN or infinite in the merged model as torch.float16" in said and "dtype=fp32" in said
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("linear {a} {b} density=0.5", "density: linear does not read it; leave it out (it is for "
         "ties, dare)"),
        ("linear {a} {b} t=0.1", "t: linear does not read it"),
        ("linear {a} {b} beta=0.2", "beta: linear does not read it"),
        ("wise-ft {a} --base {base} models.0.weight=0.3", "models.0.weight: wise-ft does not"),
        ("linear {a} {b} models.1.density=0.3", "models.1.density: linear does not read it"),
        ("ties {a} --base {base} seed=3", "seed: ties does not read it"),
        ("linear {a} {b} bta=0.3", "bta: is not a key of a recipe; did you mean 'beta'?"),
        ("linear {a} {b} lr=0.3", "lr: is not a key of a recipe; the keys are"),
    ],
)  # fmt: skip
def test_keys_the_method_does_not_read(
    models: dict[str, str], line: str, says: str, capfd: Refused
) -> None:
    assert says in refused(models, line, capfd)


def test_what_a_killed_merge_left_goes_with_the_next(
    tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    line = ["merge", "soup", models["a"], models["b"], "--out", str(out)]
    child = os.fork()
    if child == 0:  # dies as by kill -9, with its folder half written
        try:
            monkeypatch.setattr(offline, "write_small", lambda *_: os._exit(9))
            main(line)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (left,) = tmp_path.glob(".tmp-*")
    assert (left / "model.safetensors").stat().st_size > 400
    begin, _, nonce = left.name.rpartition(f"-{child}-")
    others = [
        f".tmp-out-{nonce}",  # of an older version
        f"{begin}-{os.getpid()}-{nonce}",  # of a process that runs
        f"{begin}-1-{nonce}",  # of another user's process
        f".tmp-out-000000-{child}-{nonce}",  # of another machine
        f"{begin.replace('out', 'out2')}-{child}-{nonce}",  # of another merge
        f"{left.name}-x",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    assert main(line) == 0
    assert {path.name for path in tmp_path.glob(".tmp-*")} == set(others)


def test_a_place_that_cannot_be_written(models: dict[str, str], capfd: Refused) -> None:
    line = ["merge", "soup", models["a"], models["b"], "--out", "/proc/xx"]
    assert main(line) == 2
    said = capfd.readouterr().err
    assert said == (
        "llmtrain: error: /proc/xx cannot be written: No such file or directory; choose a folder "
        "that can be created\n"
    )
