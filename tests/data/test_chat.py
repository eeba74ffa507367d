"""Conversations: templates as transformers writes them, and which tokens are trained on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from helpers.tiny import tiny_config

from llmtrain.cli.main import main
from llmtrain.config.chat import ChatConfig
from llmtrain.config.schema import PrepareConfig, SourceConfig, TextSourceConfig, TokenizerConfig
from llmtrain.data.corpus import read_manifest
from llmtrain.data.formats import open_source
from llmtrain.data.packing import Packing, Pick, samples_in
from llmtrain.data.prepare import prepare
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import DataError

WORDS = ["red", "blue", "green", "é", "東京", "one", "two", "x+y", "it's", "\n", "  ", "."]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Marks answers as transformers wants it, writes bos and eos by name, trims what is said.
MARKED = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {%- if message.role == 'assistant' %}\n"
    "{{ ' [A] ' }}{% generation %}{{ message.content | trim }}{{ eos_token }}{% endgeneration %}\n"
    "    {%- else %}\n"
    "{{ ' [' + message.role + '] ' + message.content | trim }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}{% if add_generation_prompt %}{{ ' [A] ' }}{% endif %}"
)


def make_tokenizer(folder: Path, template: str, eos: str = "<|im_end|>") -> Path:
    """A byte-level BPE of a hundred merges with ChatML's tokens, as Hugging Face keeps one."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    level = tokenizers.pre_tokenizers.ByteLevel
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = level(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=sorted(level.alphabet())
    )
    texts = [" ".join(random.Random(i).choices(WORDS, k=30)) for i in range(50)]
    inner.train_from_iterator([*texts, "user system assistant [A] [user]"] * 3, trainer)
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


def conversations(count: int, seed: int = 0, turns: int = 3) -> list[list[dict[str, str]]]:
    draw = random.Random(seed)

    def text() -> str:
        return draw.choice(WORDS[:8]) + " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))

    found = []
    for _ in range(count):
        talk = [{"role": "system", "content": text()}] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, turns)):
            talk.append({"role": "user", "content": text()})
            talk.append({"role": "assistant", "content": text() + draw.choice(["", " \n", "!"])})
        found.append(talk)
    return found


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def corpus(folder: Path, rows: list[dict[str, Any]], chat: ChatConfig, **changes: Any) -> Path:
    """A corpus of one source ``talks`` made of ``rows``."""
    source: dict[str, Any] = {"kind": "jsonl", "chat": chat}
    if (kind := changes.pop("kind", "jsonl")) == "hf":
        source |= {"kind": "hf", "hf_name": write_rows(folder / "rows.jsonl", rows)}
    else:
        source |= {"kind": kind, "paths": [write_rows(folder / f"rows.{kind}", rows)]}
    settings: dict[str, Any] = {
        "out": str(folder / "corpus"),
        "sources": {"talks": TextSourceConfig(**source)},
        "tokenizer": TokenizerConfig(kind="byte"),
        "heldout_fraction": 0.0,
        "workers": 1,
        "max_bad_fraction": 0.0,
    }
    said: list[str] = []
    settings |= changes
    prepare(PrepareConfig(**settings), say=said.append)
    return Path(settings["out"])


def read_talks(out: Path, split: str = "train") -> list[tuple[list[int], list[float]]]:
    """Tokens and weights of every conversation, padding left out."""
    source = open_source("t", SourceConfig(path=str(out / "talks" / split)), eos_id=None)
    tokens = source.read(0, source.num_tokens)
    weights = source.loss_weights(0, source.num_tokens)
    starts = np.flatnonzero(source.document_starts(0, source.num_tokens, tokens))
    assert weights is not None and starts[0] == 0
    parts = zip(np.split(tokens, starts[1:]), np.split(weights, starts[1:]), strict=True)
    return [(t.tolist(), w.tolist()) for t, w in parts if w.any()]


def transformers_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
@pytest.mark.parametrize(("template", "eos"), [(CHATML, "<|im_end|>"), (MARKED, "<|endoftext|>")])
def test_tokens_are_those_of_transformers(
    tmp_path: Path, template: str, eos: str, kind: str
) -> None:
    """Also where the tokenizer's eos ends every turn: the conversation stays one document."""
    folder = make_tokenizer(tmp_path / "tok", template, eos)
    talks = conversations(40)
    chat = ChatConfig(messages="turns", template="tokenizer")
    section = TokenizerConfig(kind="file", path=str(folder))
    rows: list[dict[str, Any]] = [{"turns": talk, "id": i} for i, talk in enumerate(talks)]
    out = corpus(tmp_path, rows, chat, tokenizer=section, kind=kind)
    theirs = transformers_tokenizer(folder)
    found = read_talks(out)
    assert len(found) == len(talks)
    for talk, (tokens, weights) in zip(talks, found, strict=True):
        assert tokens == theirs.apply_chat_template(talk, tokenize=True, return_dict=False)
        if template == MARKED:  # it says itself which tokens are answers
            want = theirs.apply_chat_template(
                talk, return_dict=True, tokenize=True, return_assistant_tokens_mask=True
            )
            assert weights == [float(w) for w in want["assistant_masks"]]
        else:
            pieces = "".join(theirs.decode([t]) for t, w in zip(tokens, weights, strict=True) if w)
            answers = [turn["content"] for turn in talk if turn["role"] == "assistant"]
            if pieces.isascii():  # else characters are cut between tokens
                assert pieces == "".join(f"{a}<|im_end|>" for a in answers)


def test_a_template_file_beside_the_tokenizer_comes_first(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "tok", "{{ nothing.at.all }}")
    (folder / "chat_template.jinja").write_text(CHATML)
    chat = ChatConfig(template="tokenizer")
    section = TokenizerConfig(kind="file", path=str(folder))
    rows = [{"prompt": "red", "response": "blue"}]
    out = corpus(tmp_path, rows, chat, tokenizer=section)
    by_path = ChatConfig(template=str(folder / "chat_template.jinja"))
    again = corpus(tmp_path, rows, by_path, tokenizer=section, out=str(tmp_path / "again"))
    assert read_talks(out) == read_talks(again)
    theirs = transformers_tokenizer(folder)
    talk = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    ((tokens, _),) = read_talks(out)
    assert tokens == theirs.apply_chat_template(talk, tokenize=True, return_dict=False)


def plain(talk: list[dict[str, str]], weights: dict[str, float]) -> tuple[list[int], list[float]]:
    """The plain template written out by bytes, with 256 after an answer."""
    tokens: list[int] = []
    out: list[float] = []
    for i, turn in enumerate(talk):
        head = ("\n\n" if i else "") + f"### {turn['role'].capitalize()}\n"
        body = list(turn["content"].encode()) + [256] * (turn["role"] == "assistant")
        weight = weights.get(turn["role"], 0.0)
        opening = 0.0 if turn["role"] == "assistant" else weight
        tokens += [*head.encode(), *body]
        out += [opening] * len(head.encode()) + [weight] * len(body)
    if tokens[-1] != 256:
        tokens.append(256)
        out.append(out[-1])
    return tokens, [0.0, *out[1:]]


@pytest.mark.parametrize(
    ("chat", "weights"),
    [
        ({}, {"assistant": 1.0}),
        (
            {"train_on": "roles", "role_weights": {"assistant": 1.0, "user": 0.25}},
            {"assistant": 1.0, "user": 0.25},
        ),
        (
            {"train_on": "roles", "role_weights": {"system": 0.5, "user": 2.0}},
            {"system": 0.5, "user": 2.0},
        ),
    ],
)
def test_plain_template_by_bytes(
    tmp_path: Path, chat: dict[str, Any], weights: dict[str, float]
) -> None:
    talks = conversations(30, seed=2)
    talks.append([*talks[0], {"role": "user", "content": "thanks"}])
    out = corpus(tmp_path, [{"m": t} for t in talks], ChatConfig(messages="m", **chat))
    assert read_talks(out) == [plain(talk, weights) for talk in talks]
    entry = read_manifest(out)["sources"]["talks"]["train"]  # type: ignore[index]
    assert entry["trained"] == sum(w > 0 for _, ws in read_talks(out) for w in ws)


def jinja_of_plain(folder: Path, talk: list[dict[str, str]], opened: bool) -> str:
    text: str = transformers_tokenizer(folder).apply_chat_template(
        talk, tokenize=False, add_generation_prompt=opened
    )
    return text


def test_the_template_goes_with_the_model(tmp_path: Path) -> None:
    """From the corpus through a checkpoint to what transformers opens, with the names it uses."""
    folder = make_tokenizer(tmp_path / "tok", MARKED, "<|endoftext|>")
    talks = conversations(30, seed=8)
    section = TokenizerConfig(kind="file", path=str(folder))
    chat = ChatConfig(messages="m", template="tokenizer")
    out = corpus(tmp_path, [{"m": t} for t in talks], chat, tokenizer=section)
    run = tiny_config(
        tmp_path, out, train__duration="1step", data__weights={"talks": 1}, data__phases=[],
        eval__every=None,
    )  # fmt: skip
    assert main(["train", str(run)]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "runs/tiny"), str(tmp_path / "hf")]) == 0
    given, found = (transformers_tokenizer(f) for f in (folder, tmp_path / "hf"))
    for talk in talks:
        options: dict[str, Any] = {"tokenize": True, "return_dict": False}
        want = given.apply_chat_template(talk, **options)
        assert found.apply_chat_template(talk, **options) == want


def test_plain_as_a_template(tmp_path: Path) -> None:
    talks = conversations(20, seed=9)
    section = TokenizerConfig(kind="bpe", vocab_size=300)
    out = corpus(tmp_path, [{"m": t} for t in talks], ChatConfig(messages="m"), tokenizer=section)
    ours = load_tokenizer(out)
    for talk, (tokens, _) in zip(talks, read_talks(out), strict=True):
        text = jinja_of_plain(out, talk, False)
        assert text.replace(ours.eos_token, "") == ours.decode(tokens)
        assert text.count(ours.eos_token) == tokens.count(ours.eos_id)
        asked = jinja_of_plain(out, talk[:-1], True)
        assert text.startswith(asked) and asked.endswith("\n\n### Assistant\n")


def test_a_corpus_of_text_in_its_place_has_no_template(tmp_path: Path) -> None:
    out = corpus(tmp_path, [GOOD], ChatConfig(messages="m"))
    assert (out / "chat_template.jinja").is_file()
    write_rows(tmp_path / "text.jsonl", [{"text": "red"}] * 3)
    text = TextSourceConfig(kind="jsonl", paths=[str(tmp_path / "text.jsonl")])
    cfg = PrepareConfig(out=str(out), sources={"talks": text}, heldout_fraction=0.0, workers=1)
    prepare(cfg, force=True, say=lambda _: None)
    assert not (out / "chat_template.jinja").exists()
    assert not (out / "talks/train/marks").exists()


def test_all_trains_every_token_but_the_first(tmp_path: Path) -> None:
    talks = conversations(5, seed=3)
    out = corpus(tmp_path, [{"m": t} for t in talks], ChatConfig(messages="m", train_on="all"))
    for talk, (tokens, weights) in zip(talks, read_talks(out), strict=True):
        assert (tokens, weights) == (plain(talk, {})[0], [0.0] + [1.0] * (len(tokens) - 1))


@pytest.mark.parametrize("pack", [True, False])
def test_windows_keep_conversations_whole(tmp_path: Path, pack: bool) -> None:
    talks = conversations(60, seed=4, turns=2)
    want = [plain(talk, {"assistant": 1.0}) for talk in talks]
    window = 200
    fits = [w for w in want if len(w[0]) <= window]
    assert 20 < len(fits) < 60
    chat = ChatConfig(messages="m", window=window, pack=pack)
    out = corpus(tmp_path, [{"m": t} for t in talks], chat, shard_bytes=4096)
    assert read_talks(out) == fits
    assert read_manifest(out)["sources"]["talks"]["long"] == 60 - len(fits)  # type: ignore[index]
    source = open_source("t", SourceConfig(path=str(out / "talks/train")), eos_id=None)
    number = samples_in(source.num_tokens, window)
    rows = Packing(window, True, True).rows([Pick(source, j, 1.0) for j in range(number)])
    found = []
    for row in range(number):
        for document in range(rows.doc_ids[row].max() + 1):
            here = rows.doc_ids[row] == document
            if rows.weights[row][here].any():
                targets, weights = rows.targets[row][here], rows.weights[row][here]
                length = len(fits[len(found)][0]) - 1
                assert (weights[length:] == 0).all()
                first = rows.tokens[row][here][:1].tolist()
                found.append((first + targets[:length].tolist(), [0.0, *weights[:length].tolist()]))
    assert found == fits
    least = sum(len(t) for t, _ in fits) / window
    assert number == len(fits) if not pack else least <= number < len(fits)


def test_same_corpus_with_workers_and_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtrain.data import prepare as module

    rows = [{"m": t} for t in conversations(3000, seed=5)]
    chat = ChatConfig(messages="m", window=200)
    whole = corpus(tmp_path, rows, chat, shard_bytes=5000, out=str(tmp_path / "whole"))
    many = corpus(tmp_path, rows, chat, shard_bytes=5000, out=str(tmp_path / "many"), workers=2)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    seen, save = [0], module._Preparation._save

    def die(self: Any) -> None:
        save(self)
        seen[0] += 1
        if seen[0] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module._Preparation, "_save", die)
    with pytest.raises(KeyboardInterrupt):
        corpus(tmp_path, rows, chat, shard_bytes=5000, out=str(tmp_path / "again"))
    monkeypatch.setattr(module._Preparation, "_save", save)
    again = corpus(tmp_path, rows, chat, shard_bytes=5000, out=str(tmp_path / "again"))

    def files(root: Path) -> dict[str, bytes]:
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    assert "talks/train/marks/index.json" in files(whole)
    assert files(whole) == files(many) == files(again)


def test_held_out_by_what_is_asked(tmp_path: Path) -> None:
    rows = [{"prompt": f"ask {i % 50}", "response": f"answer {i}"} for i in range(400)]
    out = corpus(tmp_path, rows, ChatConfig(), heldout_fraction=0.3)
    asked = {}
    for split in ("train", "heldout"):
        texts = [bytes(t for t in tokens if t < 256) for tokens, _ in read_talks(out, split)]
        asked[split] = {text.split(b"\n")[1] for text in texts}
    assert len(asked["train"]) + len(asked["heldout"]) == 50 and asked["heldout"]


GOOD = {"m": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"n": 1}, "missing field"),
        ({"m": None}, "missing field"),
        ({"m": "text"}, "wrong type"),
        ({"m": []}, "empty"),
        ({"m": ["a"]}, "wrong type"),
        ({"m": [{"content": "a"}]}, "no role"),
        ({"m": [{"role": "user"}]}, "no content"),
        ({"m": [{"role": "user", "content": 3}]}, "no content"),
        (
            {"m": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]},
            "empty response",
        ),
        ({"m": [{"role": "user", "content": "a"}]}, "nothing to train on"),
        (
            {"m": [{"role": "assistant", "content": "a <|endoftext|>"}]},
            "special token in a turn",
        ),
    ],
)
def test_bad_records_are_counted(tmp_path: Path, record: dict[str, Any], kind: str) -> None:
    chat = ChatConfig(messages="m")
    with pytest.raises(DataError, match=rf"1 of 3 records are bad \(1 {kind}\), the last at .*:2;"):
        corpus(tmp_path, [GOOD, record, GOOD], chat)
    out = corpus(tmp_path, [GOOD, record, GOOD], chat, max_bad_fraction=0.5)
    bad = read_manifest(out)["sources"]["talks"]["bad"]  # type: ignore[index]
    assert bad == {"records": 3, kind: 1} and len(read_talks(out)) == 2


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused by the template"),
        ("{{ messages[-1].content }}{% if add_generation_prompt %}!{% endif %}", "rewrites turns"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refused by the template"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path: Path, template: str, kind: str) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(template)
    with pytest.raises(DataError, match=kind):
        corpus(tmp_path, [GOOD], ChatConfig(messages="m", template=str(file)))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("chat: {template: nowhere.jinja}", "nowhere.jinja cannot be read"),
        ("chat: {template: broken.jinja}", "no valid Jinja template"),
        ("chat: {template: tokenizer}", "set prepare.tokenizer.kind: file"),
        ("chat: {prompt: question}", "1 missing field"),
        ("chat: {train_on: roles}", "give no role a weight"),
        ("chat: {role_weights: {user: 1}}", "is not read with train_on response"),
        ("chat: {train_on: some}", "train_on"),
        ("chat: {pack: false}", "needs a window"),
        ("chat: {window: 4}", "1 are longer than the window of 4 tokens"),
    ],
)
def test_what_the_user_can_cause_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}])
    (tmp_path / "broken.jinja").write_text("{% for %}")
    (tmp_path / "c.yaml").write_text(
        "prepare:\n  out: corpus\n  tokenizer: {kind: byte}\n  workers: 1\n  heldout_fraction: 0\n"
        f"  sources:\n    talks:\n      kind: jsonl\n      paths: [rows.jsonl]\n      {lines}\n"
    )
    assert main(["data", "prepare", "c.yaml"]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_inspect_shows_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = corpus(tmp_path, [GOOD] * 3, ChatConfig(messages="m", window=64))
    assert main(["data", "inspect", str(out), "--samples", "1", "--verify"]) == 0
    text = capsys.readouterr().out
    entry = read_manifest(out)["sources"]["talks"]["train"]  # type: ignore[index]
    assert f"trained on 6 of the tokens ({6 / entry['tokens']:.1%}), weights 1, windows" in text
    asked = "### User\na\n\n### Assistant\n"
    assert f"untrained, {len(asked)} tokens: {asked!r}" in text
    assert "weight 1, 2 tokens: 'b' <|endoftext|>" in text
    assert "verified: 2 files" in text
    assert main(["data", "inspect", str(out), "--samples", "0", "--duplicates"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("  talks/train"))
    assert line.split()[1:4] == ["3", "2", "0"]  # documents and copies, padding not counted
    assert load_tokenizer(out).eos_id == 256
