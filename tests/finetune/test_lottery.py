"""Lottery tickets: densities, bit-exact rewinding, one threshold; one-shot pruning of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import make_corpus, records, tiny_config
from safetensors.torch import load_file

from llmtrain.cli.main import main
from llmtrain.errors import ConfigError
from llmtrain.eval.checkpoint import evaluate_checkpoint
from llmtrain.eval.pruned import Pruned, density_sweep, essential
from llmtrain.sparsity.storage import load_masks

LEVELS, PRUNE, REWIND, STEPS = 2, 0.2, 2, 6
HOOK = [{"use": "helpers.hooks:KeepStart"}]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lottery")
    corpus = make_corpus(folder, documents=40)
    return tiny_config(
        folder,
        corpus,
        lottery={"levels": LEVELS, "prune": PRUNE, "rewind": f"{REWIND}step", "points": 3},
        hooks=HOOK,
        train__duration=f"{STEPS}step",
        eval__every=None,
        checkpoint__every=None,
    )


@pytest.fixture(scope="module")
def folder(file: Path) -> Path:
    assert main(["sparsity", "lottery", str(file)]) == 0
    return file.parent / "runs" / "tiny"


def _model(run: Path, step: int) -> dict[str, torch.Tensor]:
    (path,) = (run / "checkpoints" / f"step-{step:08d}").glob("model-*.safetensors")
    return {key.removeprefix("model."): value for key, value in load_file(path).items()}


def test_level_k_keeps_08_to_the_k_by_one_threshold_over_all_layers(folder: Path) -> None:
    found = json.loads((folder / "lottery.json").read_text())
    before = None
    for level in range(1, LEVELS + 1):
        masks = load_masks(folder / f"masks-{level:02d}.safetensors")
        total = sum(mask.kept.numel() for mask in masks.values())
        kept = sum(int(mask.kept.sum()) for mask in masks.values())
        assert kept == round((1 - PRUNE) ** level * total)
        assert found[level]["density"] == kept / total
        weights = _model(folder / f"level-{level - 1:02d}", STEPS)
        magnitudes = {name: weights[f"{name}.weight"].abs() for name in masks}
        stay = torch.cat([magnitudes[n][m.kept] for n, m in masks.items()])
        was = {
            n: torch.ones_like(m.kept) if before is None else before[n].kept
            for n, m in masks.items()
        }
        gone = torch.cat([magnitudes[n][was[n] & ~m.kept] for n, m in masks.items()])
        assert stay.min() >= gone.max()
        assert all(not (mask.kept & ~was[name]).any() for name, mask in masks.items())
        assert len({mask.density for mask in masks.values()}) > 1
        before = masks


def test_levels_rewind_bit_for_bit_and_train_what_is_left(folder: Path) -> None:
    rewind = _model(folder / "level-00", REWIND)
    for level in range(1, LEVELS + 1):
        run = folder / f"level-{level:02d}"
        masks = load_masks(folder / f"masks-{level:02d}.safetensors")
        start, end = load_file(run / "start.bin"), _model(run, STEPS)
        for name, value in rewind.items():
            layer = name.removesuffix(".weight")
            if layer in masks:
                kept = masks[layer].kept
                assert torch.equal(start[name], torch.where(kept, value, 0.0))
                assert ((end[name] != 0) == kept).float().mean() > 0.999
                assert (end[name][~kept] == 0).all()
            else:
                assert torch.equal(start[name], value)
        steps = [r["step"] for r in records(run)]
        assert steps == list(range(REWIND + 1, STEPS + 1))
        rates = {r["step"]: r["lr"] for r in records(folder / "level-00")}
        assert all(r["lr"] == rates[r["step"]] for r in records(run))


def test_the_barrier_is_that_of_the_path_and_again_nothing_is_trained(
    file: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads((folder / "lottery.json").read_text())
    assert found[0]["barrier"] is None and all(one["barrier"] >= 0 for one in found[1:])
    before = (folder / "level-01" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["sparsity", "lottery", str(file)]) == 0
    out = capsys.readouterr().out
    assert "barrier to the level before" in out and "0.64" in out
    assert (folder / "level-01" / "metrics.jsonl").read_bytes() == before
    assert json.loads((folder / "lottery.json").read_text()) == found
    assert main(["sparsity", "lottery", str(file), "lottery.prune=0.3"]) == 2
    assert "is there already (lottery.prune" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["lottery=null"], "lottery: is missing"),
        (["lottery.rewind=1dur"], "lottery.rewind: 1dur is not inside the run"),
        (["sparsity={density: 0.5}"], "sparsity: does not go together with lottery"),
    ],
)
def test_what_cannot_be_is_refused(
    file: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sparsity", "lottery", str(file), "name=refused", *words]) == 2
    assert told in capsys.readouterr().err
    assert not (file.parent / "runs" / "refused").exists()


def test_a_sweep_of_densities(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "level-00"
    found = density_sweep(run, [0.5, 0.0], device="cpu")
    assert [one.density for one in found] == [1.0, 0.5, 0.0]
    whole = evaluate_checkpoint(run, [], "cpu").domains
    assert found[0].losses == {name: values["loss"] for name, values in whole.items()}
    assert found[1].losses != found[0].losses != found[2].losses
    assert main(["sparsity", "sweep", str(run), "--granularity", "2:4"]) == 0
    out = capsys.readouterr().out
    assert "essential sparsity" in out and out.count("\n") == 4
    assert main(["sparsity", "sweep", str(run), "--granularity=2:4", "--densities=0.3"]) == 2
    assert "--densities: 0.3 cannot be met by 2:4" in capsys.readouterr().err
    assert main(["sparsity", "sweep", str(run), "--densities", "0.5,x"]) == 2
    assert "--densities" in capsys.readouterr().err
    assert main(["sparsity", "sweep", str(run), "--densities", "1.5"]) == 2
    assert "1.5 is not between 0 and 1" in capsys.readouterr().err


def test_essential_is_the_lowest_density_before_the_loss_rises() -> None:
    losses = {1.0: 2.0, 0.5: 2.01, 0.4: 2.03, 0.3: 2.0}
    found = [Pruned(density, {"a": loss}) for density, loss in losses.items()]
    assert essential(found) == 0.5


def test_a_torn_table_is_measured_again_and_a_folder_of_something_else_is_left_alone(
    file: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = (folder / "lottery.json").read_text()
    (folder / "lottery.json").write_text(table[:-20])
    assert main(["sparsity", "lottery", str(file)]) == 0
    assert (folder / "lottery.json").read_text() == table
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "config.yaml.part").touch()  # killed before anything else
    (folder.parent / "other" / "level-00").mkdir()
    assert main(["sparsity", "lottery", str(file), "name=other"]) == 2
    assert "no lottery" in capsys.readouterr().err
    assert main(["sparsity", "lottery", str(file), "lottery.points=2"]) == 2
    assert "lottery.points: 2 is too few" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--granularity: 4:8t cannot be chosen by magnitude"):
        density_sweep(folder / "level-00", [0.5], "4:8t")
