"""Penalties: gradients and values against formulas, exact resume, what a run begins with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.stored import same_bits, stored
from helpers.tiny import records, tiny_config
from torch import Tensor

from llmtrain.cli.main import main

STEPS = 20
Weights = dict[str, Tensor]
KEEP = ["checkpoint.every=1step", "checkpoint.keep=100"]


def run(folder: Path, corpus: Path, *changes: str) -> Path:
    folder.mkdir(exist_ok=True)
    assert main(["train", str(tiny_config(folder, corpus)), *changes]) == 0
    return folder / "runs" / "tiny"


def part(found: Weights, prefix: str) -> Weights:
    return {k[len(prefix) :]: v for k, v in found.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return run(tmp_path_factory.mktemp("plain"), corpus, *KEEP)


EWC = "penalty={kind: ewc, strength: 0.5, data: {letters: 1}, samples: 5}"


@pytest.mark.parametrize("section", ["penalty={kind: l2, strength: 0}", EWC.replace("0.5", "0")])
def test_strength_0_is_plain_training_bit_for_bit(
    tmp_path: Path, corpus: Path, plain: Path, section: str
) -> None:
    ours = stored(run(tmp_path, corpus, section))
    assert same_bits({k: v for k, v in ours.items() if not k.startswith("hook.")}, stored(plain))


def test_l2_pulls_by_its_formula(tmp_path: Path, corpus: Path, plain: Path) -> None:
    """Lion's moment after a step is (1 - beta2) of the gradient that the optimizer saw."""
    start = ["optim.name=lion", "optim.clip_norm=null", "train.duration=1step", "optim.lr=1e-4"]
    start += [f"init.path={plain}/checkpoints/step-00000007"]
    anchor = f"{plain}/checkpoints/step-00000019"
    bare = run(tmp_path / "a", corpus, *start)
    held = run(tmp_path / "b", corpus, *start, f"penalty={{strength: 0.3, anchor: '{anchor}'}}")
    here, there = part(stored(plain, 7), "model."), part(stored(plain, 19), "model.")
    one, two = part(stored(bare, 1), "optim."), part(stored(held, 1), "optim.")
    value = 0.0
    for name in here:
        away = here[name].double() - there[name].double()
        value += 0.15 * float(away.square().sum())
        key = f"{name}.exp_avg"
        pull = (two[key].double() - one[key].double()) / (1 - 0.95)
        torch.testing.assert_close(pull, 0.3 * away, rtol=2e-4, atol=2e-7)
    (record,) = records(held)
    assert record["method"]["penalty"] == pytest.approx(value, rel=1e-5)
    assert record["loss"] == records(bare)[0]["loss"]
    assert record["grad_norm"] != records(bare)[0]["grad_norm"]


def test_fisher_is_that_of_the_offline_estimate(tmp_path: Path, corpus: Path, plain: Path) -> None:
    """On the sequences a run of that mixture begins with, at the anchor."""
    from llmtrain.data.loader import Loader
    from llmtrain.data.plan import build_plan
    from llmtrain.eval.checkpoint import Alone
    from llmtrain.eval.loading import load_trained
    from llmtrain.merge.fisher import empirical_fisher

    point = plain / "checkpoints" / "step-00000019"
    changes = [f"init.path={point}", "train.duration=1step", "log.every=1"]
    held = run(tmp_path, corpus, *changes, EWC, "model.dropout=0.1")
    device = torch.device("cpu")
    over = ["data.phases=null", "data.weights={letters: 1}"]
    trained = load_trained(point, device, over)
    batch = Loader(build_plan(trained.cfg, 5), 5, 0, 1).batch_at(0)
    wanted = empirical_fisher(Alone(trained, device), [batch])
    found = part(stored(held, 1), "hook.penalty.fisher.")
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-9)
    assert same_bits(
        part(stored(held, 1), "hook.penalty.anchor."), part(stored(plain, 19), "model.")
    )
    # A second one adds to the first.
    section = EWC.replace("letters", "digits")[:-1] + f", fisher: '{held}'}}"
    more = run(tmp_path / "more", corpus, *changes, section)
    only = run(tmp_path / "only", corpus, *changes, EWC.replace("letters", "digits"))
    alone = part(stored(only, 1), "hook.penalty.fisher.")
    for name, value in part(stored(more, 1), "hook.penalty.fisher.").items():
        torch.testing.assert_close(value, found[name] + alone[name], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("section", ["penalty={strength: 0.1}", EWC, EWC[:-1] + ", offload: true}"])
def test_resumed_under_a_penalty_is_bit_identical(
    tmp_path: Path, corpus: Path, section: str
) -> None:
    straight = run(tmp_path / "a", corpus, section)
    run(tmp_path / "b", corpus, section, "train.stop_after=7step")
    halves = run(tmp_path / "b", corpus, section)
    assert same_bits(stored(halves), stored(straight))
    values = [r["method"]["penalty"] for r in records(halves)]
    assert values == [r["method"]["penalty"] for r in records(straight)]
    assert values[0] == 0 and values[-1] > 0
    assert main(["report", str(halves)]) == 0
    assert "<figcaption>Penalty" in (halves / "report.html").read_text()


def test_beside_adapters_only_they_are_held(tmp_path: Path, corpus: Path) -> None:
    found = stored(run(tmp_path, corpus, EWC, "model.adapters={rank: 2}"))
    held = part(found, "hook.penalty.anchor.")
    assert held and all(".adapter." in name for name in held)
    assert held.keys() == part(found, "hook.penalty.fisher.").keys()


def test_a_stronger_penalty_stays_nearer(tmp_path: Path, corpus: Path) -> None:
    away = []
    for strength in (0.001, 1.0):
        held = stored(run(tmp_path / f"{strength}", corpus, f"penalty={{strength: {strength}}}"))
        anchor = part(held, "hook.penalty.anchor.")
        end = part(held, "model.")
        away.append(sum(float((end[k] - anchor[k]).square().sum()) for k in anchor))
    assert away[1] < 0.6 * away[0]


def test_a_run_begins_with_the_weights_of_another(
    tmp_path: Path, corpus: Path, plain: Path
) -> None:
    """Small steps from a checkpoint: fresh moments, or those of the checkpoint."""
    few = ["train.duration=1step", "optim.lr=1e-12", f"init.path={plain}"]
    fresh = stored(run(tmp_path / "a", corpus, *few), 1)
    kept = stored(run(tmp_path / "b", corpus, *few, "init.optimizer=true"), 1)
    for name, value in part(stored(plain), "model.").items():
        torch.testing.assert_close(fresh[f"model.{name}"], value, rtol=0, atol=1e-9)
        assert float(fresh[f"optim.{name}.step"]) == 1
        assert float(kept[f"optim.{name}.step"]) == STEPS + 1
    meta = tmp_path / "a" / "runs" / "tiny" / "checkpoints" / "step-00000001" / "meta.json"
    assert json.loads(meta.read_text())["samples"] == 8


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["penalty={kind: ewc}"], "penalty.data: is missing"),
        (["penalty={data: {letters: 1}}"], "penalty.data: is read by kind: ewc only"),
        (["penalty={kind: ewc, data: {latters: 1}}"], "latters"),
        (["penalty={strength: -1}"], "penalty.strength: must be at least 0"),
        (["penalty={anchor: nowhere/x}"], "penalty.anchor: nowhere"),
        (["penalty={kind: ewc, fisher: nowhere/x}"], "penalty.fisher: nowhere"),
        (["penalty={strength: 1}", "parallel.engine=deepspeed"], "penalty: adds to the gradients"),
        (["init.path=nowhere/x"], "init.path: nowhere"),
        (["init={}"], "init.path: is empty"),
        (["init.path=a/b", "checkpoint.resume=a/b"], "init: stands beside checkpoint.resume"),
        (["continual.tasks=[{name: a, weights: {letters: 1}}]"], "continual: describes several"),
        (["schedule.restarts=[12step, 6step]"], "schedule.restarts: must rise"),
        (["schedule={name: infinite, cooldown: 0.9dur}"], "schedule.cooldown: warmup"),
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


def test_a_model_of_another_shape_or_tokenizer_is_refused(
    tmp_path: Path, corpus: Path, plain: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(tiny_config(tmp_path, corpus)), f"init.path={plain}"]
    assert main([*words, "model.d_model=64"]) == 2
    assert "init.path" in capfd.readouterr().err
    other = tmp_path / "tokenizer.json"
    text = next(corpus.rglob("tokenizer.json")).read_text()
    other.write_text(text + "\n")
    assert main([*words, f"data.tokenizer={other}"]) == 2
    assert "another tokenizer" in capfd.readouterr().err
    assert not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()
