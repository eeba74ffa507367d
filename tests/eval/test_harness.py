"""Log-likelihoods and continuations for task suites, and lm-evaluation-harness on top of them."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmtrain.config import RunConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.data.tokenizer import byte_tokenizer_file, load_tokenizer
from llmtrain.errors import ConfigError, EnvironmentFault
from llmtrain.eval.generation import Sampling, generate
from llmtrain.eval.harness import TaskRequest, evaluate_tasks, harness_model
from llmtrain.eval.likelihood import TextModel, windows
from llmtrain.eval.loading import Trained
from llmtrain.model import build_model, complete
from llmtrain.parallel import Degrees, Layout, init_world

CONTEXT = 24
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    file.write_bytes(byte_tokenizer_file("<|endoftext|>"))
    tokenizer = load_tokenizer(file)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=32, n_layers=2, n_heads=4, init_std=0.3
    )
    cfg = complete(shape, None, CONTEXT)
    model = build_model(cfg, seed=1, device="cpu", compute_dtype=torch.float32).eval()
    return Trained(model, cfg, RunConfig(), tokenizer, 0, file.parent, [])


@torch.no_grad()
def by_hand(trained: Trained, tokens: list[int], count: int) -> tuple[float, bool]:
    """Of the last ``count`` of ``tokens``, one forward over at most the model's length."""
    tokens = tokens[-CONTEXT - 1 :]
    logits = trained.model(torch.tensor([tokens[:-1]]))[0].double().log_softmax(-1)
    total, greedy = 0.0, True
    for place in range(len(tokens) - 1 - count, len(tokens) - 1):
        total += float(logits[place, tokens[place + 1]])
        greedy &= int(logits[place].argmax()) == tokens[place + 1]
    return total, greedy


def test_loglikelihoods(trained: Trained) -> None:
    tokenizer = trained.tokenizer
    assert tokenizer is not None
    eos = tokenizer.eos_id
    (follows,) = generate(trained.model, [tokenizer.encode("ab cd")], 3, CONTEXT, GREEDY)
    pairs = [
        ("The cat", " sat on"),
        ("", "x"),
        ("trailing ", "space"),
        ("a long context that does not fit into the model", " end"),
        ("q", " " + "long" * 9),  # longer than the model by itself
        ("ab cd", ""),
    ]
    found = TextModel(trained, batch=4).loglikelihoods(pairs)
    for (context, new), (value, greedy) in zip(pairs, found, strict=True):
        tokens = [*([] if context else [eos]), *tokenizer.encode(context + new)]
        count = min(len(tokenizer.encode(new)) + (context[-1:] == " "), CONTEXT)
        expected = by_hand(trained, tokens, count) if new else (0.0, True)
        assert value == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]
    # What greedy decoding writes is said to be so.
    pair = (tokenizer.encode("ab cd"), follows.tokens)
    assert TextModel(trained).score([pair])[0][1]
    assert not TextModel(trained).score([(pair[0], [1, *pair[1][1:]])])[0][1]


def test_windows_of_the_documentation() -> None:
    """The example in the docstring of the harness's ``LM.loglikelihood_rolling``."""
    found = [(c + t[:-1], t) for c, t in windows(list(range(10)), -1, 4)]
    assert [inputs for inputs, _ in found] == [[-1, 0, 1, 2], [3, 4, 5, 6], [5, 6, 7, 8]]
    assert [scored for _, scored in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(windows([], -1, 4)) == []


def test_rolling(trained: Trained) -> None:
    text = "Each token of this text is predicted exactly once, whatever its length."
    tokenizer = trained.tokenizer
    assert tokenizer is not None
    tokens = [tokenizer.eos_id, *tokenizer.encode(text)]
    expected = 0.0
    for start in range(1, len(tokens), CONTEXT):
        end = min(start + CONTEXT, len(tokens))
        expected += by_hand(trained, tokens[:end], end - start)[0]
    short, long = TextModel(trained, batch=2).rolling(["Hi", text])
    assert long == pytest.approx(expected, abs=1e-3)
    two = [tokenizer.eos_id, *tokenizer.encode("Hi")]
    assert short == pytest.approx(by_hand(trained, two, 2)[0], abs=1e-4)


def test_continuations(trained: Trained) -> None:
    model, tokenizer = TextModel(trained), trained.tokenizer
    assert tokenizer is not None
    (plain,) = model.continue_texts([("ab", {"max_gen_toks": 9})])
    (expected,) = generate(trained.model, [tokenizer.encode("ab")], 9, CONTEXT, GREEDY)
    assert plain == tokenizer.decode(expected.tokens) and len(plain) > 4
    end = plain[3:5]
    asked: list[tuple[str, dict[str, Any]]] = [
        ("ab", {"max_gen_toks": 9, "until": end}),
        ("ab", {"max_gen_toks": 9, "until": ["no such", end]}),
        ("ab", {"max_gen_toks": 2}),
        ("x" * 100, {"until": []}),  # room is made by dropping its beginning
    ]
    cut = plain[: plain.index(end)]
    first, second, third, last = model.continue_texts(asked)
    assert first == second == cut and third == tokenizer.decode(expected.tokens[:2])
    (kept,) = generate(trained.model, [tokenizer.encode("x" * 12)], 12, CONTEXT, GREEDY)
    assert last == tokenizer.decode(kept.tokens)
    drawn = ("ab", {"max_gen_toks": 9, "do_sample": True, "temperature": 1.5})
    assert len(set(model.continue_texts([drawn] * 3))) == 3


def alone() -> Layout:
    return Layout(init_world("cpu"), Degrees())


def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """``lm_eval.api.model`` with the part of ``LM`` that its documentation promises."""
    package, api, model = (types.ModuleType(f"lm_eval{x}") for x in ("", ".api", ".api.model"))
    model.LM = type("LM", (), {})  # type: ignore[attr-defined]
    for module in (package, api, model):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_requests_of_the_harness(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    double(monkeypatch)
    model = TextModel(trained)
    adapter = harness_model(model)
    pair = SimpleNamespace(args=("The cat", " sat"))
    assert adapter.loglikelihood([pair]) == model.loglikelihoods([("The cat", " sat")])
    assert adapter.loglikelihood_rolling([SimpleNamespace(args=("Hi",))]) == model.rolling(["Hi"])
    asked = ("ab", {"max_gen_toks": 3})
    assert adapter.generate_until([SimpleNamespace(args=asked)]) == model.continue_texts([asked])


def test_without_the_harness_one_sentence_says_so(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'llmtrain\[lm-eval\]'"):
        evaluate_tasks(trained, TaskRequest(["hellaswag"]), alone())


@pytest.mark.slow
def test_a_task_of_the_harness(trained: Trained, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [
        {"question": f"Say {word}:", "choices": [f"{word} yes", "no", "z"], "answer": 0}
        for word in ("red", "green", "blue", "black", "white")
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "tiny_choice", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(data)}}, "output_type": "multiple_choice",
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(json.dumps(task))
    request = TaskRequest(["tiny_choice"], folder=str(tmp_path))
    found = evaluate_tasks(trained, request, alone())
    assert found is not None
    model, right = TextModel(trained), 0
    for row in rows:
        scores = model.loglikelihoods([(row["question"], f" {c}") for c in row["choices"]])
        right += max(range(3), key=lambda i: scores[i][0]) == 0
    assert found["tiny_choice"]["acc"] == pytest.approx(right / len(rows))
    with pytest.raises(ConfigError, match="knows no task 'hellaswga'"):
        evaluate_tasks(trained, TaskRequest(["hellaswga"]), alone())
