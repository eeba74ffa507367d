"""`llmtrain data score`: each method against autograd, resumed, shared, averaged, bound to data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks
from helpers.tiny import make_corpus, tiny_config
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from llmtrain.cli.main import main
from llmtrain.data.batch import Batch
from llmtrain.data.loader import heldout_sets, packing_of, to_batch
from llmtrain.data.packing import Pick
from llmtrain.data.scores import LOSSES, ScoreParts, TokenLosses, read_header, read_scores
from llmtrain.eval.loading import Trained, load_trained
from llmtrain.eval.probes import METHODS
from llmtrain.eval.scoring import Request, score
from llmtrain.parallel import init_world

HELDOUT = "eval.samples=3"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    corpus = make_corpus(folder, documents=30)
    config = tiny_config(folder, corpus, train__duration="40step", checkpoint__every="20step")
    assert main(["train", str(config), "eval.every=null"]) == 0
    return folder / "runs" / "tiny"


def scored(run: Path, out: Path, method: str, *more: str) -> dict[str, NDArray[np.float64]]:
    command = ["data", "score", str(run), "--method", method, "--out", str(out), *more]
    assert main(command) == 0
    return {name: read_scores(out, name) for name in read_header(out)["sources"]}


class Plain:
    """The run's model through its logits."""

    def __init__(self, run: Path) -> None:
        self.trained: Trained = load_trained(run, torch.device("cpu"), [HELDOUT])
        self.cfg, self.model = self.trained.cfg, self.trained.model
        self.params = list(self.model.parameters())

    def sample(self, source: str, number: int) -> Batch:
        from llmtrain.data.catalogue import open_catalogue

        stream = open_catalogue(self.cfg).open_train(source)
        rows = packing_of(self.cfg.data).rows([Pick(stream, number, 1.0)])
        return to_batch(rows, np.zeros(1, np.int64), np.zeros(1, np.int64))

    def logits(self, batch: Batch) -> Tensor:
        out: Tensor = self.model(batch.tokens, positions=batch.positions, doc_ids=batch.doc_ids)
        return out.double()

    def loss(self, batches: list[Batch]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        weight = 0.0
        for batch in batches:
            nll = cross_entropy(self.logits(batch).transpose(1, 2), batch.targets, reduction="none")
            total = total + (nll * batch.weights).sum()
            weight += float(batch.weights.sum())
        return total / weight

    def gradient(self, batches: list[Batch]) -> list[Tensor]:
        return list(torch.autograd.grad(self.loss(batches), self.params))

    def heldout(self) -> list[Batch]:
        return [b for held in heldout_sets(self.cfg) for b in held.batches(16, 0, 1)]

    def expected(self, method: str, batch: Batch) -> float:
        if method == "perplexity":
            return float(self.loss([batch]).exp().detach())
        if method == "el2n":
            logits = self.logits(batch)
            wrong = logits.softmax(-1) - one_hot(batch.targets, logits.shape[-1])
            weights = batch.weights / batch.weights.sum()
            return float((wrong.norm(dim=-1) * weights).sum().detach())
        own = self.gradient([batch])
        if method == "grand":
            names = [name for name, _ in self.model.named_parameters()]
            return float(own[names.index("head.projection.weight")].norm())
        if method == "grand-full":
            return float(torch.cat([g.flatten() for g in own]).norm())
        if method == "influence-gradient":
            target = self.gradient(self.heldout())
            return float(
                sum((a.double() * b.double()).sum() for a, b in zip(own, target, strict=True))
            )
        with torch.no_grad():
            before = self.loss(self.heldout())
            torch._foreach_add_(self.params, own, alpha=-0.5)
            after = self.loss(self.heldout())
            torch._foreach_add_(self.params, own, alpha=0.5)
        return float(before - after)


@pytest.mark.parametrize("method", [name for name in METHODS if name != LOSSES])
def test_a_method_is_its_definition(run: Path, tmp_path: Path, method: str) -> None:
    found = scored(run, tmp_path / "s.parquet", method, HELDOUT, "--lr", "0.5")
    plain = Plain(run)
    for source, scores in found.items():
        for number in (0, 5, len(scores) - 1):
            expected = plain.expected(method, plain.sample(source, number))
            tolerance = 1e-6 if method == "influence" else 0.0
            assert scores[number] == pytest.approx(expected, rel=5e-5, abs=tolerance), number
        assert np.std(scores) > 2e-4 * abs(np.mean(scores))


def test_losses_of_tokens(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "losses.parquet"
    assert main(["data", "score", str(run), "--method", LOSSES, "--out", str(out)]) == 0
    plain, found = Plain(run), TokenLosses(out)
    for source in ("letters", "digits"):
        for number in (0, 33, 51):
            batch = plain.sample(source, number)
            logits = plain.logits(batch).detach()
            nll = cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
            np.testing.assert_allclose(found.read(source, number), nll[0], rtol=6e-4)


def test_the_command_line_offers_every_method() -> None:
    from llmtrain.cli.data import SCORES

    assert SCORES == METHODS


def request(run: Path, out: Path, **changes: Any) -> Request:
    facts = {"overrides": [], "checkpoints": [], "method": "el2n", "device": "cpu"} | changes
    return Request(target=run, out=out, **facts)


def share(rank: int, wanted: Request) -> None:
    score(wanted, print, init_world("cpu"))


@pytest.mark.dist
def test_ranks_share_the_work_and_the_vocabulary(run: Path, tmp_path: Path) -> None:
    alone = scored(run, tmp_path / "alone.parquet", "el2n")
    for tensor in (1, 2):
        out = tmp_path / f"{tensor}.parquet"
        wanted = request(run, out, tensor=tensor)
        run_ranks(2, share, wanted)
        for source, scores in alone.items():
            np.testing.assert_allclose(read_scores(out, source), scores, rtol=1e-5)


def test_what_is_scored_is_not_scored_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = scored(run, tmp_path / "whole.parquet", "grand")
    out = tmp_path / "s.parquet"
    written: list[str] = []
    keep = ScoreParts.write

    def stop(self: ScoreParts, piece: Any, *values: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(piece.name)
        keep(self, piece, *values)

    monkeypatch.setattr(ScoreParts, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        score(request(run, out, method="grand"), print)
    # Another method must not be mixed in.
    assert main(["data", "score", str(run), "--method", "el2n", "--out", str(out)]) == 2
    monkeypatch.setattr(ScoreParts, "write", keep)
    seen: list[str] = []

    def count(self: ScoreParts, piece: Any, *values: Any) -> None:
        seen.append(piece.name)
        keep(self, piece, *values)

    monkeypatch.setattr(ScoreParts, "write", count)
    found = scored(run, out, "grand")
    assert seen and not set(seen) & set(written)
    for source, scores in expected.items():
        np.testing.assert_array_equal(found[source], scores)
    assert not (tmp_path / "s.parquet.parts").exists()
    assert main(["data", "score", str(run), "--method", "grand", "--out", str(out)]) == 2


def test_checkpoints_are_averaged(run: Path, tmp_path: Path) -> None:
    paths = [str(p) for p in sorted((run / "checkpoints").glob("step-*"))]
    assert len(paths) == 2
    each = [scored(Path(p), tmp_path / f"{i}.parquet", "el2n") for i, p in enumerate(paths)]
    config = run.parents[1] / "tiny.yaml"
    both = scored(
        config, tmp_path / "both.parquet", "el2n", *(w for p in paths for w in ("--checkpoint", p))
    )
    for source, scores in both.items():
        np.testing.assert_allclose(scores, (each[0][source] + each[1][source]) / 2, rtol=1e-12)
    header = read_header(tmp_path / "both.parquet")
    assert [Path(p).name for p in header["checkpoints"]] == [Path(p).name for p in paths]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "el3n"], "did you mean 'el2n'"),
        (["--method", "grand-full", "--tensor", "2"], "cannot share the model"),
        (["--method", "influence", "--lr", "0"], "--lr must be above"),
        (["--method", "el2n", "data.seq_len=64"], "at most 48 tokens"),
        (["--method", "el2n", "data.weights={leters: 1}", "data.phases=[]"], "letters"),
    ],
)
def test_requests_that_cannot_be_met(
    run: Path, tmp_path: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.parquet"
    assert main(["data", "score", str(run), "--out", str(out), *words]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_a_config_needs_a_model(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(run.parents[1] / "tiny.yaml")
    out = str(tmp_path / "s.parquet")
    assert main(["data", "score", config, "--method", "el2n", "--out", out]) == 2
    assert "--checkpoint" in capsys.readouterr().err


def test_influence_needs_heldout_data(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(run.parents[1] / "corpus", corpus)
    manifest = json.loads((corpus / "manifest.json").read_text())
    for source in manifest["sources"].values():
        source["heldout"]["tokens"] = 0
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    words = ["--method", "influence", "--out", str(tmp_path / "s.parquet")]
    assert main(["data", "score", str(run), f"data.corpus={corpus}", *words]) == 2
    assert "data.heldout" in capsys.readouterr().err
