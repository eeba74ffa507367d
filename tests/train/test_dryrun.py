"""``llmtrain train --dry-run``, alone and for a world that is not here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from helpers.tiny import tiny_config

from llmtrain.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


def test_a_70b_on_a_thousand_ranks(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "70b.yaml"
    run = {
        "base": [str(ROOT / "configs" / "models" / "llama3-70b.yaml")],
        "data": {"corpus": str(corpus), "seq_len": 8192, "weights": {"letters": 1, "digits": 1}},
        "train": {"duration": "100step", "global_batch_size": 1024, "micro_batch_size": 1},
        "parallel": {"tensor": 8, "replicate": 4},
    }
    config.write_text(yaml.safe_dump(run))
    assert main(["train", str(config), "--dry-run", "--world", "1024"]) == 0
    assert not dist.is_initialized()
    text = " ".join(capsys.readouterr().out.split())
    norms, total = 161 * 8192, 70_553_706_496
    share = ((total - norms) // 8 + norms) // 32
    assert f"{share:,} elements in 483 tensors on a rank" in text
    assert f"weights (fp32) {4 * share / 2**30:.2f} GiB" in text
    assert f"optimizer state {(8 * share + 4 * 483) / 2**30:.2f} GiB" in text
    # Unsharded until the last of 8 micro-batches, and sharded 32 ways after it.
    assert f"gradients {4 * 32 * share / 2**30:.2f} GiB" in text
    # 80 layers, 8 micro-batches, 6 gathers each of 8192 tokens in bf16.
    assert "blocks all-gather tensor 8 3,840 128.00 MiB 420.00 GiB" in text
    assert "1024 process(es) = 4 replicate x 32 shard x 8 tensor" in text
    assert len(text) < 5000


def run(config: Path, *words: str) -> int:
    return main(["train", str(config), *words])


def test_a_world_needs_a_dry_run(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, corpus)
    assert run(config, "--world", "8") == 2
    assert "--world 8 only plans: add --dry-run" in capsys.readouterr().err
    assert run(config, "--dry-run", "--world", "0") == 2
    assert "--world 0: the number of processes is 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["parallel.tensor=3"], "parallel.tensor"),
        (["parallel.tensor=2", "model.d_ff=47"], "d_ff"),
        (["parallel.replicate=3"], "parallel.replicate"),
        (["train.global_batch_size=7"], "train.global_batch_size"),
        (["train.micro_batch_size=3"], "train.micro_batch_size"),
        (["parallel.tensor=4", "model.vocab_multiple=1"], "vocab_multiple"),
        (["init.path=nowhere"], "init.path: nowhere does not exist"),
        (["average.anchor=nowhere"], "average.anchor: nowhere does not exist"),
    ],
    ids=["heads", "mlp", "world", "batch", "micro-batch", "vocabulary", "init", "anchor"],
)
def test_it_fails_where_the_run_would(
    tmp_path: Path,
    corpus: Path,
    overrides: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config(tmp_path, corpus)
    assert run(config, "--dry-run", "--world", "4", *overrides) == 2
    assert named in capsys.readouterr().err


def test_uneven_shards_and_pipeline_ranks_are_told_apart(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, corpus, train__global_batch_size=12)
    assert run(config, "--dry-run", "--world", "3", "precision.compute=bf16") == 0
    text = capsys.readouterr().out
    assert "hardware: 3 processes elsewhere, bf16" in text
    (row,) = (line.split() for line in text.splitlines() if "blocks.*.mlp.down.weight" in line)
    # 32 rows on 3 ranks: 11, 11, 10.
    assert row[1:] == ["32", "x", "48", "11", "x", "48", "10", "x", "48"]
    assert "uneven shards are padded to the first" in text


def test_alone_there_is_nothing_to_communicate(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_config(tmp_path, corpus), "--dry-run") == 0
    text = capsys.readouterr().out
    assert "communication" not in text and "peak" in text
