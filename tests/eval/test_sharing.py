"""``llmtrain generate`` and ``eval --tasks`` on several processes against one."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.ranks import RankError, run_ranks
from helpers.tiny import make_corpus, tiny_config

from llmtrain import parallel
from llmtrain.cli.main import main
from llmtrain.eval import sharing
from llmtrain.eval.likelihood import TextModel
from llmtrain.parallel import init_world

PROMPTS = ["alpha ", "one 2 three", "b", "gamma delta alpha", "five ", "4", "beta"]
WORDS = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
# Greedy texts of tensor ranks, whose sums round otherwise; drawn ones where sums are the same.
GREEDY = ["--temperature", "0", "--tokens", "7"]
DRAWN = ["--seed", "3", "--tokens", "7"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    corpus = make_corpus(folder, documents=40)
    config = tiny_config(folder, corpus, train__duration="4step", eval__every=None)
    assert main(["train", str(config)]) == 0
    return folder / "runs" / "tiny"


class Manager:
    """The part of the harness's ``TaskManager`` that is asked; it knows one task."""

    def __init__(self, include_path: str | None) -> None:
        self.folder = include_path

    def match_tasks(self, names: list[str]) -> list[str]:
        return [name for name in names if name == "tiny"]


def simple_evaluate(model: Any, limit: int | None, **other: Any) -> dict[str, Any]:
    """Requests of three kinds, more than one can tell apart by luck; what came back as metrics."""
    texts = PROMPTS[:limit]
    pairs = [SimpleNamespace(args=(text, end)) for text in texts for end in (" a", " one", "x")]
    likely = model.loglikelihood(pairs)
    rolling = model.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in texts])
    settings = {"max_gen_toks": 6, "do_sample": True, "temperature": 1.2}
    new = model.generate_until([SimpleNamespace(args=("beta", settings)) for _ in texts])
    numbers = {f"likely{i},none": value for i, (value, _) in enumerate(likely)}
    numbers |= {f"rolling{i},none": value for i, value in enumerate(rolling)}
    numbers |= {f"new{i},none": float(sum(map(ord, text))) for i, text in enumerate(new)}
    return {"results": {"tiny": numbers}}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for ``lm_eval``, which runs on the main rank alone."""
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.tasks")
    package, api, model, tasks = (types.ModuleType(name) for name in names)
    model.LM = type("LM", (), {})  # type: ignore[attr-defined]
    tasks.TaskManager = Manager  # type: ignore[attr-defined]
    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    for module in (package, api, model, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    # The ranks part at the end of the test.
    monkeypatch.setattr(parallel, "close_world", lambda: None)
    yield


def count(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, place: int) -> list[int]:
    """Lengths of argument ``place`` of all calls to come."""
    seen: list[int] = []
    real = getattr(owner, name)

    def counted(*args: Any, **keys: Any) -> Any:
        seen.append(len(args[place]))
        return real(*args, **keys)

    monkeypatch.setattr(owner, name, counted)
    return seen


@pytest.mark.dist
@pytest.mark.parametrize(("world", "tensor"), [(3, 1), (4, 2)])
def test_as_one_process(
    run: Path,
    harness: None,
    world: int,
    tensor: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    generate = ["generate", str(run), *WORDS, *(DRAWN if tensor == 1 else GREEDY)]
    tasks = ["eval", str(run), "--tasks", "tiny", "--limit", "5", "--json"]
    assert main(generate) == 0
    alone = capfd.readouterr()
    assert main(tasks) == 0
    expected = json.loads(capfd.readouterr().out)["tasks"]["tiny"]
    assert len(set(expected.values())) > 20
    prompts = count(monkeypatch, sharing, "generate", 1)
    pairs = count(monkeypatch, TextModel, "loglikelihoods", 1)
    asked = count(monkeypatch, TextModel, "continue_texts", 1)

    def body(rank: int) -> tuple[list[int], list[int], list[int]]:
        assert main([*generate, "--tensor", str(tensor)]) == 0
        print("---", flush=True) if rank == 0 else None
        assert main([*tasks, "--tensor", str(tensor)]) == 0
        return prompts, pairs, asked

    counts = run_ranks(world, body)
    out = capfd.readouterr().out
    texts, _, found = out.partition("---\n")
    assert texts == alone.out
    numbers = json.loads(found)["tasks"]["tiny"]
    assert numbers == pytest.approx(expected, abs=1e-4)
    shares = {(3, 1): ([3, 2, 2], [5] * 3, [2, 2, 1]), (4, 2): ([4, 4, 3, 3], [8, 8, 7, 7], None)}
    wanted = shares[world, tensor]
    assert [p for (p,), _, _ in counts] == wanted[0]
    assert [p for _, (p,), _ in counts] == wanted[1]
    assert [p for _, _, (p,) in counts] == (wanted[2] or [3, 3, 2, 2])


@pytest.mark.dist
def test_faults_end_every_process(
    run: Path, harness: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rolling = TextModel.rolling

    def fails_on_one(self: TextModel, texts: list[str]) -> list[float]:
        if init_world("cpu").rank == 1:
            raise MemoryError("no room on this one")
        return rolling(self, texts)

    def body(rank: int) -> list[int]:
        codes = [main(["eval", str(run), "--tasks", "tyni"])]
        codes.append(main(["generate", str(run), *WORDS, "--prompt", "alpha " * 99]))
        codes.append(main(["generate", str(run), *WORDS, "--tensor", "3"]))
        return codes

    codes = run_ranks(2, body)
    assert codes == [[2, 2, 2], [0, 2, 2]]
    err = capfd.readouterr().err
    assert "knows no task 'tyni'" in err
    assert "prompt 8 has" in err
    assert "--tensor: 3 processes cannot share each model where there are 2" in err
    monkeypatch.setattr(TextModel, "rolling", fails_on_one)
    with pytest.raises(RankError) as failed:
        run_ranks(2, lambda rank: main(["eval", str(run), "--tasks", "tiny"]))
    for rank in (0, 1):
        assert f"rank {rank}:" in str(failed.value)
    assert "no room on this one" in str(failed.value)


def test_tensor_is_for_tasks(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--tensor", "2"]) == 2
    assert "--tensor is for --tasks" in capsys.readouterr().err
