"""The hook sets exactly the formula's gradient, over the whole global batch, on any layout."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.tiny import make_corpus, records, tiny_config
from torch.nn.functional import cross_entropy

from llmtrain.cli.main import main
from llmtrain.config import RunConfig, load_config
from llmtrain.data.batch import Batch
from llmtrain.data.loader import Loader
from llmtrain.data.plan import build_plan
from llmtrain.loss.reweight import STRATEGIES, by_surprise
from llmtrain.methods.reweight import Reweight
from llmtrain.model import resolve_model
from llmtrain.parallel import build_layout, init_world
from llmtrain.parallel.hardware import resolve_precision
from llmtrain.train.clockwork import Clockwork
from llmtrain.train.hooks import load_hooks
from llmtrain.train.module import TrainModule
from llmtrain.train.run import train


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    config = tiny_config(folder, corpus, name="reference", train__duration="6step")
    assert main(["train", str(config)]) == 0
    return folder / "runs" / "reference"


def load(folder: Path, corpus: Path, reweight: dict[str, Any], **changes: Any) -> RunConfig:
    config = tiny_config(
        folder,
        corpus,
        reweight=reweight,
        train__duration="6step",
        eval__every=None,
        checkpoint__every=None,
        checkpoint__asynchronous=False,
        **changes,
    )
    return load_config(config, for_training=True)


def one_step(cfg: RunConfig) -> tuple[Any, Batch, torch.Tensor]:
    """(hook's trainer after ``before_batch`` and backward, batch, weights that came in)."""
    world = init_world("cpu")
    plan = build_plan(cfg, 6 * cfg.train.global_batch_size)
    model_cfg = resolve_model(cfg, plan.vocab_size)
    layout = build_layout(cfg.parallel, world, model_cfg.n_kv_heads or 1)
    precision = resolve_precision(cfg.precision, world.device)
    module = TrainModule(cfg, model_cfg, precision, layout)
    # At its initialisation a model has nearly equal losses, whose differences are rounding.
    with torch.no_grad():
        for name, role in module.roles.items():
            if role == "head":
                module.params[name].mul_(30)
    batch = Loader.from_config(plan, cfg, layout.data_rank, layout.degrees.data).batch(3)
    before = batch.weights.clone()
    times = Clockwork.from_config(cfg)
    parts = {"module": module, "clockwork": times, "plan": plan}
    trainer = SimpleNamespace(cfg=cfg, world=world, step_done=3, **parts)
    (hook,) = load_hooks(cfg)
    assert isinstance(hook, Reweight)
    hook.on_run_start(trainer)  # type: ignore[arg-type]
    hook.before_batch(trainer, batch)  # type: ignore[arg-type]
    (weight,) = world.sum([module.token_weight(batch)])
    trainer.hook, trainer.weight = hook, weight
    trainer.sums = module.forward_backward(batch, weight, len(plan.names))
    return trainer, batch, before


def plain_losses(module: TrainModule, batch: Batch) -> torch.Tensor:
    """Cross-entropy per token through the logits, with gradient, [b, s] float64."""
    logits = module.model(batch.tokens, positions=batch.positions, doc_ids=batch.doc_ids)
    return cross_entropy(logits.double().transpose(1, 2), batch.targets, reduction="none")


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("micro", [8, 3, 1])
def test_the_gradient_is_that_of_the_weighted_sum(
    tmp_path: Path, corpus: Path, strategy: str, micro: int
) -> None:
    section = {"samples": strategy, "temperature": 0.3, "warmup": "2step"}
    changes = {} if micro != 3 else {"train__global_batch_size": 9}
    cfg = load(tmp_path, corpus, section, train__micro_batch_size=micro, **changes)
    trainer, batch, before = one_step(cfg)
    found = {n: p.grad.clone() for n, p in trainer.module.params.items()}
    trainer.module.drop_gradients()

    losses = plain_losses(trainer.module, batch)
    sample = (losses * before).sum(1) / before.sum(1)
    h = 2 * (sample - sample.min()) / (sample.max() - sample.min()) - 1
    f = STRATEGIES[strategy](h.detach())
    w = torch.exp(f / 0.3) / torch.exp(f / 0.3).sum()
    (w * sample).sum().backward()
    assert trainer.weight == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(trainer.hook.last, w, rtol=0, atol=1e-6)
    assert float(trainer.sums.loss) == pytest.approx(float((w * sample).sum().detach()), rel=1e-5)
    for name, p in trainer.module.params.items():
        # float32 rounding is relative to a matrix, not to its smallest elements.
        assert float((found[name] - p.grad).norm()) < 5e-5 * float(p.grad.norm()), name


@pytest.mark.parametrize(("micro", "passes"), [(8, 1), (2, 7), (1, 15)])
def test_the_last_forward_is_not_made_twice(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, micro: int, passes: int
) -> None:
    """m micro-batches take m passes, and m - 1 of them one more for their losses."""
    made: list[int] = []
    real = TrainModule._forward

    def count(self: TrainModule, **arguments: Any) -> Any:
        made.append(len(arguments["tokens"]))
        return real(self, **arguments)

    monkeypatch.setattr(TrainModule, "_forward", count)
    section = {"samples": "linupper", "warmup": "0step"}
    one_step(load(tmp_path, corpus, section, train__micro_batch_size=micro))
    assert made == [micro] * passes


def test_two_passes_come_to_the_same(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pipelines and DeepSpeed do it; dropout is that of the sample, in whatever pass."""
    section = {"samples": "extremes", "temperature": 0.3, "warmup": "0step", "tokens": "focal"}
    cfg = load(tmp_path, corpus, section, train__micro_batch_size=4, model__dropout=0.2)
    once, batch, _ = one_step(cfg)
    monkeypatch.setattr(TrainModule, "begins", False)
    twice, again, _ = one_step(cfg)
    torch.testing.assert_close(batch.weights, again.weights, rtol=1e-6, atol=0)
    assert len(set(once.hook.last.tolist())) == 7  # the lowest and the highest weigh alike
    for name, p in once.module.params.items():
        torch.testing.assert_close(p.grad, twice.module.params[name].grad, rtol=1e-4, atol=1e-6)


def test_weights_changed_by_a_later_hook_count(tmp_path: Path, corpus: Path) -> None:
    """What was computed ahead with other weights is then not used."""
    section = {"samples": "linupper", "warmup": "0step"}
    cfg = load(tmp_path, corpus, section, train__micro_batch_size=4)
    trainer, batch, _ = one_step(cfg)
    module: TrainModule = trainer.module
    weights = batch.weights.clone()

    def gradients(change: str) -> dict[str, torch.Tensor]:
        module.drop_gradients()
        batch.weights = weights.clone()
        if change != "never":
            module.begin(batch, lambda nll: None)
        if change == "after":
            batch.weights.mul_(torch.arange(1.0, 9.0)[:, None])
        elif change in ("before", "never"):
            batch.weights = weights * torch.arange(1.0, 9.0)[:, None]
        module.forward_backward(batch, 2.0, len(cfg.data.phases))
        return {name: p.grad.clone() for name, p in module.params.items() if p.grad is not None}

    expected = gradients("never")
    for change in ("after", "before"):
        for name, found in gradients(change).items():
            torch.testing.assert_close(found, expected[name], rtol=1e-6, atol=1e-9)
    module.begin(batch, lambda nll: None)
    module.drop_gradients()
    module.forward_backward(batch, 2.0, len(cfg.data.phases))
    for name, p in module.params.items():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-7)


def test_the_warmup_weighs_all_alike_or_has_its_own_temperature(
    tmp_path: Path, corpus: Path
) -> None:
    section = {"samples": "extremes", "temperature": 0.1, "warmup": "4step"}
    trainer, batch, _ = one_step(load(tmp_path, corpus, section))
    assert trainer.hook.last.tolist() == pytest.approx([1 / 8] * 8)
    warm = one_step(load(tmp_path, corpus, {**section, "warmup_temperature": 0.5}))[0].hook.last
    cold = one_step(load(tmp_path, corpus, {**section, "warmup": "3step"}))[0].hook.last
    # log w is f / r up to a constant, so the ratio of temperatures shows.
    spread = [float(x.log().max() - x.log().min()) for x in (warm, cold)]
    assert spread[1] == pytest.approx(5 * spread[0], rel=1e-9)
    assert len(batch) == 8


@pytest.fixture(scope="module")
def losses(reference: Path, corpus: Path) -> Path:
    """The reference's losses of all tokens, in a file."""
    file = reference.parent / "losses.parquet"
    words = ["--method", "token-losses", "--out", str(file)]
    assert main(["data", "score", str(reference), *words]) == 0
    return file


@pytest.mark.parametrize("micro", [8, 2])
def test_a_file_of_losses_stands_for_the_reference(
    tmp_path: Path, corpus: Path, reference: Path, losses: Path, micro: int
) -> None:
    for tokens in ("prior", "rho"):
        section = {"tokens": tokens, "gamma": 0.7, "keep": 0.3}
        found = []
        for more in ({"reference": str(reference)}, {"losses": str(losses)}):
            # Some samples only, so that numbers within a source and places in the order differ.
            select = {"mode": "random", "keep": 0.5}
            changes = {"data__select": select, "train__micro_batch_size": micro}
            found.append(
                one_step(load(tmp_path, corpus, {**section, **more}, **changes))[1].weights
            )
        if tokens == "prior":
            torch.testing.assert_close(*found, rtol=2e-3, atol=1e-4)
        else:  # rounding to float16 may exchange tokens at the threshold
            assert int((found[0] != found[1]).sum()) <= 2 < int((found[1] > 0).sum())


def test_losses_of_other_data_are_refused(
    tmp_path: Path, corpus: Path, reference: Path, losses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmtrain.errors import DataError

    section = {"tokens": "prior", "losses": str(losses)}
    with pytest.raises(DataError, match=r"reweight.losses: .* of samples of 48 tokens"):
        one_step(load(tmp_path, corpus, section, data__seq_len=32))
    (tmp_path / "other").mkdir()
    other = make_corpus(tmp_path / "other", documents=40, seed=1)
    with pytest.raises(DataError, match="is of other data than the source"):
        one_step(load(tmp_path, other, section))
    scores = tmp_path / "scores.parquet"
    words = ["--method", "el2n", "--out", str(scores)]
    assert main(["data", "score", str(reference), *words]) == 0
    with pytest.raises(DataError, match="not the losses of their tokens"):
        one_step(load(tmp_path, corpus, {**section, "losses": str(scores)}))
    select = {"scores": str(tmp_path / "none.parquet")}
    with pytest.raises(DataError, match=r"data.select.scores: .*none.parquet is missing"):
        one_step(load(tmp_path, corpus, {"samples": "plain"}, data__select=select))
    select = {"scores": str(losses)}
    with pytest.raises(DataError, match=r"data.select.scores: .* not scores of samples"):
        one_step(load(tmp_path, corpus, {"samples": "plain"}, data__select=select))


@pytest.mark.parametrize("tokens", ["focal", "prior", "rho"])
def test_token_weights(tmp_path: Path, corpus: Path, reference: Path, tokens: str) -> None:
    section = {"tokens": tokens, "gamma": 0.7, "keep": 0.3}
    if tokens != "focal":
        section["reference"] = str(reference)
    trainer, batch, before = one_step(load(tmp_path, corpus, section))
    own = plain_losses(trainer.module, batch).detach()
    if tokens == "focal":
        expected = before * (1 - torch.exp(-own)) ** 0.7
    else:
        logits = trainer.hook.reference.model(
            batch.tokens, positions=batch.positions, doc_ids=batch.doc_ids
        )
        theirs = cross_entropy(logits.double().transpose(1, 2), batch.targets, reduction="none")
        theirs = theirs.detach()
        expected = before * by_surprise(theirs, 0.7)
        if tokens == "rho":
            excess = (own - theirs)[before > 0]
            n = math.ceil(0.3 * len(excess))
            least = excess.sort(descending=True).values[n - 1]
            expected = before * ((own - theirs) >= least - 1e-6)
            assert int((expected > 0).sum()) == n
    torch.testing.assert_close(batch.weights, expected.float(), rtol=1e-4, atol=1e-6)


def test_static_weights_of_sources_stay(tmp_path: Path, corpus: Path) -> None:
    """A source of loss_weight 0 has no say, one of 0.25 a quarter; token weights change neither."""
    section = {"samples": "linupper", "tokens": "focal", "warmup": "0step"}
    source = {"digits": {"path": f"{corpus}/digits/train", "loss_weight": 0.25}}
    trainer, batch, before = one_step(load(tmp_path, corpus, section, data__sources=source))
    static = before.sum(1) / (before > 0).sum(1)
    assert set(static.tolist()) == {0.25, 1.0}
    expected = trainer.hook.last * static
    torch.testing.assert_close(batch.weights.double().sum(1), expected, rtol=1e-5, atol=1e-8)
    assert float(trainer.hook.last.sum()) == pytest.approx(1.0)


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {"train__micro_batch_size": 1}),
    (2, {"parallel__replicate": 2, "train__micro_batch_size": 2}),
    (2, {"parallel__shard": 2}),
    (2, {"parallel__shard": 2, "train__micro_batch_size": 1, "train__recompute": "full"}),
    (2, {"parallel__tensor": 2}),
    (2, {"parallel__context": 2, "train__micro_batch_size": 4}),
    (2, {"parallel__pipeline": 2, "train__micro_batch_size": 2}),
    (4, {"parallel__replicate": 2, "train__micro_batch_size": 1}),
]


def steps_of(cfg: RunConfig, ranks: int) -> list[dict[str, Any]]:
    def body(rank: int) -> int:
        return train(cfg, init_world("cpu"))

    run_ranks(ranks, body)
    return records(Path(cfg.out) / cfg.name)


@pytest.mark.dist
@pytest.mark.parametrize("method", ["focal", "rho", "file"])
def test_layouts_and_accumulation_agree(
    tmp_path: Path, corpus: Path, reference: Path, losses: Path, method: str
) -> None:
    section = {
        "samples": "quadratic",
        "temperature": 0.4,
        "warmup": "2step",
        "tokens": "rho",
        "keep": 0.5,
        "reference": str(reference),
    }
    if method == "focal":
        section = {**section, "tokens": "focal"}
        del section["reference"], section["keep"]
    if method == "file":
        section = {**section, "tokens": "prior", "losses": str(losses)}
        del section["reference"], section["keep"]
    alone = steps_of(load(tmp_path, corpus, section), 1)
    assert len(alone) == 6
    for i, (ranks, changes) in enumerate(LAYOUTS):
        if method == "rho" and {"parallel__context", "parallel__pipeline"} & set(changes):
            continue  # refused
        folder = tmp_path / str(i)
        folder.mkdir()
        steps = steps_of(load(folder, corpus, section, **changes), ranks)
        for ours, theirs in zip(steps, alone, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5), (i, ours["step"])
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-4)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({}, "changes nothing"),
        ({"tokens": "rho"}, "reference.*is missing"),
        ({"tokens": "focal", "reference": "runs/x"}, "is not read"),
        ({"tokens": "focal", "losses": "x"}, "is not read"),
        ({"tokens": "rho", "reference": "runs/x", "losses": "x"}, "keep one"),
        ({"samples": "linuper"}, "linupper"),
        ({"samples": "plain", "warmup": "9step"}, "longer than the run"),
        ({"samples": "plain", "temperature": 0}, "temperature"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_sections_that_cannot_be_meant(
    tmp_path: Path, corpus: Path, section: dict[str, Any], says: str
) -> None:
    from llmtrain.errors import ConfigError

    with pytest.raises(ConfigError, match=says):
        load(tmp_path, corpus, section)


def test_a_reference_that_does_not_fit_is_refused(
    tmp_path: Path, corpus: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"tokens": "prior", "reference": str(reference)}
    for change, says in (("data.seq_len=64", "at most 48"), ("model.vocab_size=300", "257")):
        load(tmp_path, corpus, section)
        assert main(["train", str(tmp_path / "tiny.yaml"), change]) == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "runs").exists()
    # Of its own checkpoints none is whole.
    broken = tmp_path / "broken"
    shutil.copytree(reference, broken)
    for file in broken.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    for path in (broken, tmp_path / "none", corpus):
        assert main(["train", str(tmp_path / "tiny.yaml"), f"reweight.reference={path}"]) == 2
        assert f"reweight.reference: {path} " in capsys.readouterr().err
        assert not (tmp_path / "runs").exists()


def test_a_file_of_losses_is_looked_at_before_the_run_begins(
    tmp_path: Path, corpus: Path, losses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(tmp_path, corpus, {"tokens": "rho", "losses": str(losses)})
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(losses.read_bytes()[:-100])
    for file, says in ((cut, "is no score file"), (tmp_path / "none.parquet", "is missing")):
        assert main(["train", str(tmp_path / "tiny.yaml"), f"reweight.losses={file}"]) == 2
        assert f"reweight.losses: {file} {says}" in capsys.readouterr().err
        assert not (tmp_path / "runs").exists()
