"""Checkpoints of DeepSpeed runs: ours on any engine, and DeepSpeed's universal ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.layout_runs import build, case, configs, one_step
from helpers.ranks import run_ranks
from helpers.tiny import environment, llmtrain, records, tiny_config
from torch import Tensor

from llmtrain.checkpoint import Checkpointer, read_files, verify
from llmtrain.checkpoint.layout import read_layout
from llmtrain.checkpoint.tensors import read_tensor
from llmtrain.checkpoint.universal import from_deepspeed, to_deepspeed
from llmtrain.config import to_yaml
from llmtrain.config.upkeep import CheckpointConfig
from llmtrain.errors import CheckpointError
from llmtrain.parallel.fragment import Fragment
from llmtrain.parallel.zero import import_deepspeed

pytestmark = pytest.mark.dist

WHAT = case(tie_embeddings=True, attention_bias=True)


def stored(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    return {key: read_tensor(path, key, entry) for key, entry in read_layout(path).items()}


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import_deepspeed(torch.device("cpu"))


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return train(tmp_path_factory.mktemp("native"), corpus)


def train(folder: Path, corpus: Path, *changes: str, ranks: int = 1, fresh: bool = False) -> Path:
    """A run of eight steps to its end; all it says is our own."""
    folder.mkdir(exist_ok=True)
    config = tiny_config(
        folder, corpus, train__duration="8step", checkpoint__every="4step", eval__every="4step",
        train__micro_batch_size=2, eval__prompts=["alpha"], eval__generate_tokens=2,
    )  # fmt: skip
    done = llmtrain("train", str(config), *changes, ranks=ranks, fresh=fresh)
    assert done.returncode == 0, done.stderr
    noise = [line for line in done.stderr.splitlines() if "OMP_NUM_THREADS" not in line]
    assert [line for line in noise if line.strip("* ")] == []
    said = done.stdout.splitlines()
    assert said[0].startswith("hardware: ") and said[-1].startswith("done: ")
    assert not [line for line in said if "WARN" in line or "DeepSpeed" in line]
    return folder / "runs" / "tiny"


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Same losses and norms to rounding, same state at the end, in the same files' layout."""
    for a, b in zip(records(ours), records(theirs)[-len(records(ours)) :], strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=5e-6)
    a, b = (stored(run / "checkpoints" / "step-00000008") for run in (ours, theirs))
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=0, atol=2e-5, msg=key)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, ["parallel.zero_stage=3", "parallel.tensor=2"]),
        (1, ["parallel.zero_stage=1", "parallel.offload_optimizer=true"]),
    ],
    ids=["ZeRO-3 x TP2", "alone"],
)
def test_begun_on_one_engine_and_ended_on_the_other(
    tmp_path: Path, corpus: Path, native: Path, ranks: int, changes: list[str]
) -> None:
    """DeepSpeed to the half, then one native process; and from its half, DeepSpeed to the end."""
    zero = ["parallel.engine=deepspeed", *changes]
    half = train(tmp_path / "a", corpus, *zero, ranks=ranks, fresh=ranks > 1)
    assert_same_run(half, native)
    point = half / "checkpoints" / "step-00000004"
    assert verify(point) == []
    assert_same_run(train(tmp_path / "b", corpus, f"checkpoint.resume={point}"), native)
    point = native / "checkpoints" / "step-00000004"
    back = train(tmp_path / "c", corpus, f"checkpoint.resume={point}", *zero, ranks=ranks)
    assert_same_run(back, native)


def save_both(rank: int, folder: Path) -> None:
    """Two steps under ZeRO 3, saved in our format and in DeepSpeed's own."""
    module = build(rank, 2, WHAT, {"engine": "deepspeed", "zero_stage": 3})
    for step in range(2):
        one_step(module, step)
    cfg, model_cfg = configs(WHAT, {})
    files = {
        "config.yaml": to_yaml(cfg),
        "data.json": json.dumps({"vocab_size": model_cfg.vocab_size}),
        "extra.json": "{}",
    }
    settings = CheckpointConfig(asynchronous=False)
    with Checkpointer(folder / "run" / "checkpoints", settings, dist.group.WORLD) as saver:
        saver.save(2, module.tensors(), files, meta={"samples": 24, "tokens": 480})
    module.model.save_checkpoint(str(folder / "deepspeed"), tag="global_step2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/: our checkpoint; deepspeed/: its own; theirs/: that as DeepSpeed makes it universal."""
    path = tmp_path_factory.mktemp("universal")
    run_ranks(2, save_both, path)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    places = ["--input_folder", str(path / "deepspeed" / "global_step2")]
    places += ["--output_folder", str(path / "theirs" / "global_step2")]
    done = subprocess.run(
        [*command, *places, "--num_extract_workers=1", "--num_merge_workers=1"],
        env={**environment(), "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return path


def test_our_universal_checkpoint_holds_what_deepspeeds_own_holds(
    folder: Path, tmp_path: Path
) -> None:
    ours = to_deepspeed(folder / "run", tmp_path / "ours") / "zero"
    theirs = folder / "theirs" / "global_step2" / "zero"
    names = {p.name for p in theirs.iterdir()}
    assert names == {p.name for p in ours.iterdir()} and len(names) > 20
    for name in names - {"optimizer_state.pt"}:
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            a = torch.load(ours / name / f"{state}.pt", weights_only=True)["param"]
            b = torch.load(theirs / name / f"{state}.pt", weights_only=True)
            b = b["param"] if isinstance(b, dict) else b
            assert torch.equal(a.flatten(), b.flatten()), (name, state)


def loaded(rank: int, source: Path, expected: dict[str, Tensor]) -> list[str]:
    """State that differs after DeepSpeed itself has loaded ``source``, under each stage."""
    wrong = []
    for stage in (1, 2, 3):
        module: Any = build(rank, 2, WHAT, {"engine": "deepspeed", "zero_stage": stage})
        module.model._config.load_universal_checkpoint = True
        path, _ = module.model.load_checkpoint(str(source))
        assert path is not None and module.model.global_steps == 2
        for key, value in module.tensors().items():
            boxes: Any = [((), value)]
            if isinstance(value, Fragment):
                boxes = [(p.offset, p.values) for p in value.pieces]
            for offset, values in boxes:
                part = expected[key]
                for dim, start in enumerate(offset):
                    part = part.narrow(dim, start, values.shape[dim])
                if not torch.equal(part, values):
                    wrong.append(f"ZeRO {stage}: {key}")
        assert sum(isinstance(v, Fragment) for v in module.tensors().values()) > 60
    return wrong


def test_deepspeed_loads_our_universal_checkpoint(folder: Path, tmp_path: Path) -> None:
    to_deepspeed(folder / "run", tmp_path / "ours")
    expected = stored(folder / "run" / "checkpoints" / "step-00000002")
    assert run_ranks(2, loaded, tmp_path / "ours", expected) == [[], []]


@pytest.mark.parametrize("source", ["ours", "theirs"])
def test_a_universal_checkpoint_comes_back_bit_for_bit(
    folder: Path, tmp_path: Path, source: str
) -> None:
    before = folder / "run" / "checkpoints" / "step-00000002"
    if source == "ours":
        to_deepspeed(before, tmp_path / "ours")
        after = from_deepspeed(tmp_path / "ours", tmp_path / "run")
    else:
        with pytest.raises(CheckpointError, match=r"give a checkpoint .* as --like"):
            from_deepspeed(folder / "theirs", tmp_path / "run")
        after = from_deepspeed(folder / "theirs", tmp_path / "run", like=folder / "run")
    assert after.name == before.name and verify(after) == []
    a, b = stored(after), stored(before)
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    meta = json.loads(read_files(after)["meta.json"])
    assert (meta["step"], meta["samples"], meta["tokens"]) == (2, 24, 480)
    assert read_files(after)["config.yaml"] == read_files(before)["config.yaml"]


def test_the_commands_and_their_errors(folder: Path, tmp_path: Path) -> None:
    done = llmtrain("checkpoint", "to-deepspeed", str(folder / "run"), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out" / "step-00000002")
    back = ["checkpoint", "from-deepspeed", str(tmp_path / "out"), str(tmp_path / "run")]
    done = llmtrain(*back)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "run" / "checkpoints" / "step-00000002")
    done = llmtrain("checkpoint", "to-deepspeed", str(folder / "run"), str(tmp_path / "out"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "exists and is not empty" in done.stderr
    with pytest.raises(CheckpointError, match="is not a universal checkpoint"):
        from_deepspeed(tmp_path, tmp_path / "x")
    weight = tmp_path / "out" / "step-00000002" / "zero" / "final_norm.weight"
    torch.save({"param": torch.zeros(3)}, weight / "exp_avg.pt")
    with pytest.raises(CheckpointError, match=r"holds 3 values where \[32\] is wanted"):
        from_deepspeed(tmp_path / "out", tmp_path / "y")
    (weight / "exp_avg.pt").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="cannot be read"):
        from_deepspeed(tmp_path / "out", tmp_path / "y")
    (weight / "exp_avg.pt").unlink()
    with pytest.raises(CheckpointError, match=r"exp_avg\.pt is missing"):
        from_deepspeed(tmp_path / "out", tmp_path / "y")
    (tmp_path / "out" / "step-00000002" / "zero" / "other.weight").mkdir()
    with pytest.raises(CheckpointError, match=r"holds unknown parameters: other\.weight"):
        from_deepspeed(tmp_path / "out", tmp_path / "y")
