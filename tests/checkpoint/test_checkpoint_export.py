"""Export of a model alone, and the `llmtrain checkpoint` command."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtrain.checkpoint import Checkpointer, export_model, scan
from llmtrain.cli import checkpoint as cli
from llmtrain.config.upkeep import CheckpointConfig
from llmtrain.errors import CheckpointError


def model() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "embed.weight": torch.randn(31, 8, generator=generator),
        "blocks.0.up.weight": torch.randn(16, 8, generator=generator),
        "norm.weight": torch.randn(8, generator=generator),
        "count": torch.tensor(3),
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    checkpoints = Checkpointer(
        tmp_path / "run" / "checkpoints", CheckpointConfig(asynchronous=False, keep=9)
    )
    state = {f"model.{k}": v for k, v in model().items()}
    state |= {f"optim.{k}.exp_avg": v for k, v in model().items()}
    files = {"config.yaml": "seed: 1", "tokenizer.json": "{}", "data.json": "{}"}
    for step in (50, 100, 150):
        checkpoints.save(step, state, files, meta={"tokens": step * 4096}, permanent=step == 50)
    checkpoints.close()
    return tmp_path / "run"


def command(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(word) for word in words]))


def test_one_file(run: Path, tmp_path: Path) -> None:
    written = export_model(run, tmp_path / "deep" / "out")
    assert [p.name for p in written] == ["model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "deep" / "out").iterdir()) == [
        "config.yaml", "meta.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    got = load_file(written[0])
    assert got.keys() == model().keys()
    assert all(torch.equal(got[k], v) for k, v in model().items())


def test_shards_with_an_index_and_another_dtype(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = run / "checkpoints/step-00000100"
    written = export_model(source, out, dtype=torch.bfloat16, shard_bytes=500)
    assert [p.name for p in written] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    got = {name: load_file(out / file)[name] for name, file in index["weight_map"].items()}
    assert sum(len(load_file(path)) for path in written) == len(got)
    assert index["metadata"]["total_size"] == sum(v.numel() * v.itemsize for v in got.values())
    for key, value in model().items():
        wanted = value.bfloat16() if value.is_floating_point() else value
        assert got[key].dtype == wanted.dtype and torch.equal(got[key], wanted)


def test_memory_holds_one_tensor(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtrain.checkpoint import export as module

    alive: list[str] = []
    real_read, real_append = module.read_tensor, module._append

    def read(path: Path, key: str, layout: object) -> torch.Tensor:
        alive.append(key)
        assert len(alive) == 1
        return real_read(path, key, layout)  # type: ignore[arg-type]

    def append(*args: object) -> None:
        real_append(*args)  # type: ignore[arg-type]
        alive.clear()

    monkeypatch.setattr(module, "read_tensor", read)
    monkeypatch.setattr(module, "_append", append)
    export_model(run, tmp_path / "out")


def test_exports_that_cannot_be(run: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    with pytest.raises(CheckpointError, match="taken exists and is not empty"):
        export_model(run, tmp_path / "taken")
    with pytest.raises(CheckpointError, match=r"no tensor is named ema\.\*"):
        export_model(run, tmp_path / "out", prefix="ema.")
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_model(run, tmp_path / "taken" / "file" / "out")
    for step in (50, 100, 150):
        path = run / f"checkpoints/step-{step:08d}/model-00000-of-00001.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="holds no checkpoint that can be used"):
        export_model(run, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "taken"]


def test_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints/step-00000150/meta.json"
    assert command("list", run) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["step", "tokens", "size", "age", "ranks", "kept", "status"]
    assert [(r[0], r[1], r[-2], r[-1]) for r in rows[1:]] == [
        ("50", "204,800", "permanent", "complete"),
        ("100", "409,600", "temporary", "complete"),
        ("150", "614,400", "temporary", "complete"),
    ]
    path.unlink()
    assert command("list", run) == 0
    out = capsys.readouterr().out
    assert "damaged" in out and "meta.json is missing" in out.replace("\n", "")


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("verify", run) == 0
    assert capsys.readouterr().out.count(": good (") == 3
    path = run / "checkpoints/step-00000100/optim-00000-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 2
    path.write_bytes(data)
    assert command("verify", run) == 2
    out = capsys.readouterr().out
    assert "step-00000100: " in out and f"{path} is damaged" in out and out.count("good") == 2
    assert command("verify", run / "checkpoints/step-00000150") == 0


def test_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("prune", run, "--keep", "1", "--dry-run") == 0
    assert "would delete" in capsys.readouterr().out
    assert len(scan(run / "checkpoints")) == 3
    assert command("prune", run, "--keep", "1") == 0
    assert "step-00000100" in capsys.readouterr().out
    assert [c.step for c in scan(run / "checkpoints")] == [50, 150]
    assert command("prune", run, "--keep", "1") == 0
    assert "nothing to delete" in capsys.readouterr().out
    Checkpointer(run / "checkpoints", CheckpointConfig()).set_aside(after=50)
    assert command("list", run) == 0
    assert "1 abandoned by a restart" in capsys.readouterr().out
    assert command("prune", run, "--abandoned") == 0
    assert "deleted" in capsys.readouterr().out
    assert [p.name for p in (run / "checkpoints").glob("[!.]*")] == ["step-00000050"]
    with pytest.raises(CheckpointError, match="--keep must be at least 1"):
        command("prune", run, "--keep", "0")


def test_export_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("export", run, tmp_path / "out", "--dtype", "bf16", "--shard-gb", "3e-7") == 0
    assert capsys.readouterr().out.count(".safetensors") == 3
    with pytest.raises(CheckpointError, match="is not a folder"):
        command("export", tmp_path / "nowhere", tmp_path / "out2")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        command("list", tmp_path)


def test_listing_needs_no_torch(run: Path) -> None:
    code = (
        "import sys, argparse\n"
        "from llmtrain.cli import checkpoint as c\n"
        "p = argparse.ArgumentParser(); c.add_arguments(p)\n"
        "for a in ('list', 'verify', 'prune'): assert c.run(p.parse_args([a, sys.argv[1]])) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    words = [sys.executable, "-c", code, str(run)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1234567, "1.2 MB"), (5.1e12, "5.1 TB")]
)
def test_sizes(size: float, text: str) -> None:
    assert cli.size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0 s"), (59, "59 s"), (61, "1 min"), (7300, "2 h"), (2e5, "2 d")]
)
def test_ages(seconds: float, text: str) -> None:
    assert cli.age_text(seconds) == text
