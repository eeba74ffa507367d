"""Spectra of changes: known ones exactly, and read from every kind of model folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hf_folders import run_convert, their_model
from helpers.ranks import run_ranks
from helpers.tiny import make_corpus, tiny_config

from llmtrain.analysis.spectra import (
    Spectrum,
    effective_rank,
    explaining_rank,
    singular_values,
    spectra,
)
from llmtrain.analysis.weights import open_matrices
from llmtrain.cli.main import main
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.eval.loading import load_trained


def with_spectrum(values: list[float], rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(values))
    left, right = (
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64)).Q
        for n in (rows, columns)
    )
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([1.0] * 10, 9),  # nine tenths of ten equal ones: on the border exactly
        ([3.0, 1.0], 1),  # 9 of 10: on the border exactly
        ([3.0, 1.0001], 2),
        ([2.0, 2.0, 1.0, 0.5], 3),
        ([5.0], 1),
        ([4.0, 3.0, 2.0, 1.0], 3),  # 16 + 9 = 25 of 30 are not enough
    ],
)
@pytest.mark.parametrize("shape", [(23, 17), (17, 40)])
def test_ranks_of_known_spectra(values: list[float], rank: int, shape: tuple[int, int]) -> None:
    """Exact in float64, also where the share falls on the border."""
    found = singular_values(with_spectrum(values, *shape))
    assert len(found) == 17
    assert found[: len(values)] == pytest.approx(values, abs=1e-12)
    assert max(found[len(values) :], default=0.0) < 1e-13
    assert explaining_rank(values) == explaining_rank(found) == rank
    shares = [v / sum(values) for v in values]
    expected = math.prod(p**-p for p in shares)
    assert effective_rank(found) == pytest.approx(expected, rel=1e-9)


def test_of_nothing() -> None:
    assert explaining_rank([0.0, 0.0]) == 0 and effective_rank([0.0]) == 0.0
    assert effective_rank([2.0] * 5) == pytest.approx(5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, a full and a LoRA finetuning of it, the full one saved by two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = make_corpus(folder, documents=40)
    config = str(tiny_config(folder, corpus, train__duration="3step", eval__every=None))
    out = folder / "runs"
    assert main(["train", config, "name=base"]) == 0
    init = [f"init.path={out / 'base'}", "seed=3"]
    adapters = "model.adapters={rank: 2, targets: [attention, gate, down]}"
    assert main(["train", config, "name=lora", *init, adapters, "optim.lr=0.05"]) == 0

    def body(rank: int) -> int:
        from llmtrain.train import run

        run.close_world = lambda: None  # the ranks part at the end
        return main(["train", config, "name=full", *init])

    assert run_ranks(2, body) == [0, 0]
    return {name: out / name for name in ("base", "lora", "full")} | {"corpus": corpus}


def weight(run: Path, name: str) -> torch.Tensor:
    return load_trained(run, torch.device("cpu")).model.get_parameter(name).detach()


@pytest.mark.dist
def test_the_changes_of_full_and_low_rank_training(runs: dict[str, Path]) -> None:
    base, full, lora = (open_matrices(runs[name]) for name in ("base", "full", "lora"))
    found = {s.name: s for s in spectra(base, full)}
    assert len(found) == 14 and found["blocks.1.attention.q"].shape == (32, 32)
    # Rows of qkv by hand: two groups of two query heads, a key and a value of 8 rows each.
    change = weight(runs["full"], "blocks.1.attention.qkv.weight") - weight(
        runs["base"], "blocks.1.attention.qkv.weight"
    )
    keys = torch.cat((change[16:24], change[48:56])).double()
    expected = torch.linalg.svdvals(keys).tolist()
    assert found["blocks.1.attention.k"].values == pytest.approx(expected, rel=1e-5, abs=1e-8)
    gate = weight(runs["full"], "blocks.0.mlp.up.weight") - weight(
        runs["base"], "blocks.0.mlp.up.weight"
    )
    norm = float(gate[0::2].double().norm())
    assert found["blocks.0.mlp.gate"].norm == pytest.approx(norm, rel=1e-5)
    low = {s.name: s for s in spectra(base, lora)}
    for name, one in low.items():
        if name.endswith("mlp.up"):
            assert one.rank90 == 0  # not adapted
        else:
            assert 1 <= one.rank90 <= 2 < found[name].rank90
            assert max(one.values[2:]) < 1e-5 * one.values[0]


@pytest.mark.dist
def test_the_command(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, full, lora = (str(runs[name]) for name in ("base", "full", "lora"))
    assert main(["compare", base, full, lora, "eval.samples=2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("change of weights") == 2 and "attention.q" in out and "letters" in out
    record = json.loads((tmp_path / "compare.json").read_text())
    assert set(record["losses"]) == {base, full, lora}
    assert len(record["spectra"][lora]) == 14
    assert "</svg>" in (tmp_path / "spectra.svg").read_text()
    picked = ["--no-eval", "--matrices", "blocks.*.mlp.down", "--json"]
    assert main(["compare", base, full, *picked]) == 0
    assert len(json.loads(capsys.readouterr().out)["spectra"][full]) == 2
    assert main(["compare", base, full, "--no-eval", "--matrices", "blocks.*.mlp.dwon"]) == 2
    assert "'blocks.*.mlp.dwon' names no matrix" in capsys.readouterr().err
    assert main(["compare", base, full, "--no-eval", "--no-spectra"]) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "pythia"])
def test_hugging_face_folders_are_read_as_what_they_become(name: str, tmp_path: Path) -> None:
    model: Any = their_model(name)
    model.save_pretrained(tmp_path / "a", max_shard_size="40KB")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * 0.01)
    model.save_pretrained(tmp_path / "b")
    assert run_convert("from-hf", tmp_path / "b", tmp_path / "ours") == 0
    a, b, ours = (open_matrices(tmp_path / x) for x in ("a", "b", "ours"))
    direct = spectra(a, b, ["*"])
    assert direct == spectra(a, ours, ["*"])
    assert {s.kind for s in direct} >= {"embedding", "attention.q", "attention.out", "mlp.down"}
    for one in direct:
        assert one.rank90 > 0.3 * min(one.shape)  # iid noise has full rank


def test_what_does_not_fit(tmp_path: Path) -> None:
    their_model("llama").save_pretrained(tmp_path / "a")
    their_model("gpt2").save_pretrained(tmp_path / "b")
    with pytest.raises(CheckpointError, match="different shapes"):
        spectra(open_matrices(tmp_path / "a"), open_matrices(tmp_path / "b"))
    with pytest.raises(ConfigError, match="names no matrix"):
        spectra(open_matrices(tmp_path / "a"), open_matrices(tmp_path / "a"), ["nothing"])
    with pytest.raises(CheckpointError, match="not a folder"):
        open_matrices(tmp_path / "c")


def test_an_unchanged_matrix() -> None:
    one = Spectrum("blocks.0.mlp.up", (2, 2), (0.0, 0.0), 3.0)
    assert (one.rank90, one.relative, one.kind, one.block) == (0, 0.0, "mlp.up", 0)
