"""Averaging in a run on one process: identities, float64 references, exact resume, bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.stored import same_bits, stored
from helpers.tiny import losses, records, tiny_config
from torch import Tensor

from llmtrain.cli.main import main
from llmtrain.config import load_config
from llmtrain.eval.loading import load_trained
from llmtrain.model import build_model, resolve_model

STEPS = 20
Weights = dict[str, Tensor]


def run(folder: Path, corpus: Path, *changes: str) -> Path:
    """Train the tiny config in this process; returns the run's folder."""
    folder.mkdir(exist_ok=True)
    assert main(["train", str(tiny_config(folder, corpus)), *changes]) == 0
    return folder / "runs" / "tiny"


def model(run: Path, step: int = STEPS) -> Weights:
    return {k: v for k, v in stored(run, step).items() if k.startswith("model.")}


def initial(run: Path) -> Weights:
    """The weights a run of this config begins with."""
    cfg = load_config(run / "config.yaml")
    shape = resolve_model(cfg, 257)
    made = build_model(shape, seed=cfg.seed, device="cpu", compute_dtype=torch.float32)
    return {f"model.{k}": v.detach() for k, v in made.named_parameters()}


KEEP = ["checkpoint.every=1step", "checkpoint.keep=100"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run without averaging, with a checkpoint of every step."""
    return run(tmp_path_factory.mktemp("plain"), corpus, *KEEP)


def test_beta_0_is_plain_training_bit_for_bit(tmp_path: Path, corpus: Path, plain: Path) -> None:
    sfa = run(tmp_path, corpus, "average={method: sfa, every: 3step, beta: 0}")
    assert losses(sfa) == losses(plain)
    ours = {k: v for k, v in stored(sfa).items() if not k.startswith("hook.")}
    assert same_bits(ours, stored(plain))


def test_beta_1_returns_the_anchor(tmp_path: Path, corpus: Path) -> None:
    sfa = run(tmp_path, corpus, "average={method: sfa, every: 7step, beta: 1}")
    assert same_bits(model(sfa), initial(sfa))


def test_p_1_is_one_interpolation_as_in_wise_ft(tmp_path: Path, corpus: Path, plain: Path) -> None:
    sfa = run(tmp_path, corpus, "average={method: sfa, every: 1dur, beta: 0.3}")
    start, end = initial(plain), model(plain)
    for name, value in model(sfa).items():
        wanted = 0.7 * end[name].double() + 0.3 * start[name].double()
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-8)
    assert losses(sfa) == losses(plain)
    (event,) = [r for r in records(sfa, "event") if "merged" in r["text"]]
    assert event["step"] == STEPS


def test_the_merge_at_the_end_comes_where_pt_does_not_divide_t(
    tmp_path: Path, corpus: Path
) -> None:
    sfa = run(tmp_path, corpus, "average={method: sfa, every: 8step, beta: 0.5}")
    merges = [r["step"] for r in records(sfa, "event") if "merged" in r["text"]]
    assert merges == [8, 16, 20]
    # What was evaluated at the end is what the checkpoint holds.
    alone = load_trained(sfa, torch.device("cpu"))
    assert alone.step == STEPS


def test_a_rolling_anchor_moves_with_each_merge(tmp_path: Path, corpus: Path) -> None:
    sfa = run(tmp_path, corpus, "average={every: 5step, beta: 0.25, anchor: rolling}", *KEEP)
    held = stored(sfa, 10)
    for name, value in model(sfa, 10).items():
        assert torch.equal(held[f"hook.average.anchor.{name[6:]}"], value)


def test_an_anchor_from_a_checkpoint(tmp_path: Path, corpus: Path, plain: Path) -> None:
    anchor = plain / "checkpoints" / "step-00000007"
    sfa = run(tmp_path, corpus, f"average={{every: 1dur, beta: 0.5, anchor: '{anchor}'}}")
    end, old = model(plain), model(plain, 7)
    for name, value in model(sfa).items():
        wanted = (end[name].double() + old[name].double()) / 2
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-8)


def test_ema_follows_its_formula(tmp_path: Path, corpus: Path, plain: Path) -> None:
    section = "average={method: ema, every: 2step, start: 3step, decay: 0.6}"
    ema = run(tmp_path, corpus, section)
    wanted = {k: v.double() for k, v in model(plain, 3).items()}
    for step in range(5, STEPS + 1, 2):
        now = model(plain, step)
        wanted = {k: 0.6 * v + 0.4 * now[k].double() for k, v in wanted.items()}
    for name, value in model(ema).items():
        torch.testing.assert_close(value.double(), wanted[name], rtol=2e-6, atol=1e-8)


def test_latest_is_the_mean_of_the_last_snapshots(
    tmp_path: Path, corpus: Path, plain: Path
) -> None:
    section = "average={method: latest, every: 4step, keep: 3}"
    latest = run(tmp_path, corpus, section)
    parts = [model(plain, step) for step in (12, 16, 20)]
    for name, value in model(latest).items():
        wanted = sum(p[name].double() for p in parts) / 3
        assert torch.equal(value, wanted.float())
    averaged = {r["step"]: r for r in records(latest, "eval_of")}
    assert set(averaged) == {10}  # at the end the averaged weights are those evaluated
    assert averaged[10]["weights"] == "latest"


def test_averaged_weights_are_what_is_evaluated_and_training_goes_on_untouched(
    tmp_path: Path, corpus: Path, plain: Path
) -> None:
    section = "average={method: latest, every: 10step, keep: 1, replace: false}"
    latest = run(tmp_path, corpus, section, "eval.every=15step")
    assert losses(latest) == losses(plain)
    # At step 15 the average is the weights of step 10, which the plain run evaluated.
    (ours,) = [r for r in records(latest, "eval_of") if r["step"] == 15]
    (theirs,) = [r for r in records(plain, "eval") if r["step"] == 10]
    assert ours["domains"] == theirs["domains"]


def test_stock_equals_the_formula_in_float64(tmp_path: Path, corpus: Path, plain: Path) -> None:
    changes = ["train.duration=8step", "schedule.name=constant", "data.phases=null"]
    changes += ["data.weights={letters: 1, digits: 1}"]
    section = "average={method: stock, every: 4step, keep: 2}"
    stock = run(tmp_path, corpus, section, *changes, *KEEP)
    assert [r["step"] for r in records(stock, "event") if "excursions" in r["text"]] == [8]
    held = stored(stock, 7)
    first = {k[len("hook.average.excursion0.") :]: v for k, v in held.items() if "cursion0" in k}
    straight = run(tmp_path / "straight", corpus, *changes, *KEEP)
    assert same_bits({f"model.{k}": v for k, v in first.items()}, model(straight, 4))
    start = initial(straight)
    assert not same_bits(model(stock, 5), model(straight, 5))
    assert all(torch.equal(v, start[k]) for k, v in model(stock, 4).items())


METHODS = {
    "sfa": "average={method: sfa, every: 7step, beta: 0.4}",
    "rolling": "average={method: sfa, every: 7step, beta: 0.4, anchor: rolling}",
    "ema": "average={method: ema, every: 3step, decay: 0.7}",
    "latest": "average={method: latest, every: 3step, keep: 2, start: 4step}",
    "stock": "average={method: stock, every: 4step, keep: 3}",
    "stock on disk": "average={method: stock, every: 4step, keep: 3, storage: disk}",
}


@pytest.mark.parametrize("name", METHODS)
def test_resumed_across_merges_is_bit_identical(tmp_path: Path, corpus: Path, name: str) -> None:
    straight = run(tmp_path / "a", corpus, METHODS[name])
    for stop in ("train.stop_after=6step", "train.stop_after=13step"):
        run(tmp_path / "b", corpus, METHODS[name], stop)
    halves = run(tmp_path / "b", corpus, METHODS[name])
    assert losses(halves) == losses(straight)
    assert same_bits(stored(halves), stored(straight))


def test_a_section_added_or_taken_away_on_resume(tmp_path: Path, corpus: Path) -> None:
    run(tmp_path, corpus, METHODS["sfa"], "train.stop_after=10step")
    run(tmp_path, corpus, "train.stop_after=15step")
    begun = run(tmp_path, corpus, METHODS["sfa"])
    # The anchor is the weights averaging began with: those of step 15.
    held = stored(begun)
    anchor = {k: v for k, v in held.items() if k.startswith("hook.average.anchor.")}
    assert anchor and not same_bits(
        {"model." + k[len("hook.average.anchor.") :]: v for k, v in anchor.items()}, initial(begun)
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["average={beta: 1.5}"], "average.beta: must be at most 1"),
        (["average={beta: -0.1}"], "average.beta: must be at least 0"),
        (["average={method: ema, every: null}"], "average.every: ema needs it"),
        (["average={method: stock, keep: 1}"], "average.keep: stock needs at least 2"),
        (["average={every: 21step}"], "average.every: 21step is longer than the run"),
        (["average={start: 21step}"], "average.start: 21step is after the end"),
        (["average={anchor: nowhere/step-00000001}"], "average.anchor: nowhere"),
        (["average={methd: ema}"], "did you mean 'method'"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path,
    corpus: Path,
    changes: list[str],
    says: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", str(tiny_config(tmp_path, corpus)), *changes]) == 2
    assert says in capfd.readouterr().err


def test_another_method_on_resume_is_refused(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = run(tmp_path, corpus, METHODS["sfa"], "train.stop_after=10step")

    def files() -> dict[Path, tuple[int, int]]:
        found = {p: p.stat() for p in place.rglob("*") if p.is_file() and p.name != ".lock"}
        return {p: (s.st_size, s.st_mtime_ns) for p, s in found.items()}

    before = files()
    assert main(["train", str(tiny_config(tmp_path, corpus)), METHODS["ema"]]) == 2
    assert "average.method: the checkpoint was made with sfa" in capfd.readouterr().err
    assert files() == before
