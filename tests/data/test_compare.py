"""Copies, near copies and benchmark overlap: planted ones are found, and nothing else is."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from llmtrain.cli.main import main
from llmtrain.config.schema import PrepareConfig, TextSourceConfig, TokenizerConfig
from llmtrain.data.duplicates import find_duplicates, jaccard, minhash, shingles
from llmtrain.data.overlap import find_overlap
from llmtrain.data.prepare import prepare
from llmtrain.data.words import Hasher, Stream, ngrams

WORDS = [a + b for a in ("ka", "lo", "mi", "nu", "pe", "ra") for b in ("ba", "de", "fi", "go", "s")]


class Texts:
    """A token source of UTF-8 bytes with 256 after each document, as ``FlatSource`` offers it."""

    def __init__(self, texts: list[str]) -> None:
        parts = [np.frombuffer(t.encode(), np.uint8).astype(np.int64) for t in texts]
        self.tokens = np.concatenate([np.append(part, 256) for part in parts])
        self.num_tokens = len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]

    def document_starts(self, start: int, stop: int, tokens: np.ndarray) -> np.ndarray:
        before = np.concatenate([[256], self.tokens])[start:stop]
        return before == 256

    def loss_weights(self, start: int, stop: int) -> None:
        return None


def stream(texts: list[str], name: str = "s", tokenizer: bool = True) -> Stream:
    from llmtrain.data.tokenizer import ByteTokenizer

    made = ByteTokenizer.__new__(ByteTokenizer) if tokenizer else None
    return Stream(name, Texts(texts), made)  # type: ignore[arg-type]


def document(draw: random.Random, length: int = 120) -> list[str]:
    return draw.choices(WORDS, k=length)


def true_jaccard(a: list[str], b: list[str]) -> float:
    x, y = ({tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (a, b))
    return len(x & y) / len(x | y)


@pytest.mark.parametrize("tokenizer", [True, False])
def test_planted_copies_are_counted_exactly(tokenizer: bool) -> None:
    draw = random.Random(1)
    docs = [document(draw) for _ in range(300)]
    texts = [" ".join(d) for d in docs]
    texts += [texts[7], texts[7], texts[30]]
    again = " ".join(docs[50])
    texts.append(again.upper() + "!" if tokenizer else again)  # the same words
    found = find_duplicates([stream(texts, tokenizer=tokenizer)], 0.8, [False], 3)
    assert found.documents == [304]
    assert (found.exact, found.near) == ([4], [0])
    end = len(again) + 1
    tail = end + 1 if tokenizer else end
    assert found.tokens == [2 * (len(texts[7]) + 1) + len(texts[30]) + 1 + tail]
    assert [n for n, _ in found.groups] == [3, 2, 2]
    if tokenizer:
        assert texts[7].startswith(found.groups[0][1])


def test_near_copies_are_those_beyond_the_threshold_and_no_others() -> None:
    draw = random.Random(2)
    docs = [document(draw) for _ in range(150)]
    above = below = 0
    texts = [" ".join(d) for d in docs]
    for i in range(120):
        other = list(docs[i])
        for _ in range(i % 6):
            other[draw.randrange(len(other))] = draw.choice(WORDS)
        if other == docs[i]:
            continue
        near = true_jaccard(docs[i], other) >= 0.8
        above, below = above + near, below + (not near)
        texts.append(" ".join(other))
    assert above > 20 and below > 20
    found = find_duplicates([stream(texts)], 0.8, [False], 0)
    assert (found.exact, found.near) == ([0], [above])


def test_signatures_agree_as_often_as_sets_do() -> None:
    draw = random.Random(3)
    hasher = Hasher()
    gaps = []
    for i in range(40):
        a = document(draw, 400)
        b = [*a[: 400 - 8 * i], *document(draw, 8 * i)]
        x, y = (shingles(hasher.text(" ".join(d))) for d in (a, b))
        assert jaccard(x, y) == pytest.approx(true_jaccard(a, b))
        gaps.append(float((minhash(x) == minhash(y)).mean()) - jaccard(x, y))
    # 40 estimates of 64 hashes each: standard error of the mean below 0.01
    assert abs(np.mean(gaps)) < 0.03
    assert np.abs(gaps).max() < 0.25


def test_copies_are_counted_where_they_come_later_and_leaks_are_told() -> None:
    draw = random.Random(4)
    first = [" ".join(document(draw)) for _ in range(20)]
    second = [*(" ".join(document(draw)) for _ in range(10)), first[3], ""]
    held = [first[5], " ".join(document(draw)), second[0] + " and"]
    streams = [stream(first, "a"), stream(second, "b"), stream(held, "a/heldout")]
    found = find_duplicates(streams, 0.8, [False, False, True], 3)
    assert found.documents == [20, 12, 3]
    assert (found.exact, found.near, found.leaked) == ([0, 1, 1], [0, 0, 1], 2)


def test_planted_benchmark_items_are_found(tmp_path: Path) -> None:
    draw = random.Random(5)
    docs = [document(draw, 300) for _ in range(40)]
    questions = [document(draw, 40) for _ in range(25)]
    docs[3][100:140] = questions[2]  # whole
    docs[9][0:20] = questions[4][10:30]  # 8 of its 28 13-grams
    docs[9][50:63] = [*questions[5][0:12], "end"]  # 12 words: one too few
    docs[11][100:140] = questions[2]
    file = tmp_path / "quiz.jsonl"
    with file.open("w") as out:
        for words in questions:
            question, answer = " ".join(words[:25]), " ".join(words[25:])
            out.write(json.dumps({"question": question.title() + "?", "a": [answer]}) + "\n")
        out.write(json.dumps({"question": "too short"}) + "\n")
    streams = [stream([" ".join(d) for d in docs[:10]], "x"), stream([" ".join(docs[11])], "y")]
    (found,) = find_overlap(streams, [file], 13)
    assert (found.items, found.short, found.touched, found.whole) == (25, 1, 2, 1)
    assert (found.grams, found.found) == (25 * 28, 28 + 8)
    assert found.documents == [2, 1]
    (shorter,) = find_overlap(streams, [file], 12)
    assert shorter.touched == 3


def test_ngrams_are_those_of_their_words() -> None:
    words = Hasher().text("a b c a b c a b d")
    three = ngrams(words, 3)
    assert len(three) == 7 and three[0] == three[3] and len(set(three.tolist())) == 4
    assert len(ngrams(words, 10)) == 0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    draw = random.Random(6)
    texts = [" ".join(document(draw, 60)) for _ in range(50)]
    rows = [*texts, *texts[:5], texts[20] + " more"]
    file = folder / "web.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    (folder / "quiz.txt").write_text(texts[9] + "\n" + " ".join(document(draw, 60)) + "\n")
    cfg = PrepareConfig(
        out=str(folder / "corpus"),
        sources={"web": TextSourceConfig(kind="jsonl", paths=[str(file)])},
        tokenizer=TokenizerConfig(kind="byte"),
        heldout_fraction=0.2,
        workers=1,
    )
    prepare(cfg, say=lambda text: None)
    return folder


def test_inspect_prints_the_counts(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--samples", "0", "--duplicates", "--benchmark", str(corpus / "quiz.txt")]
    assert main(["data", "inspect", str(corpus / "corpus"), *words]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    last = [row for row in rows if len(row) == 5 and row[0].startswith("web/")]
    assert sum(int(row[1]) for row in last) == 56
    assert sum(int(row[2]) for row in last) == 5
    assert sum(int(row[3]) for row in last) == 1
    assert "quiz.txt: 1 of 2 items share 13 words in a row with the text, 1 wholly" in out
    assert "held-out documents with a copy" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--duplicates", "1.5"], "--duplicates must be above 0"),
        (["--benchmark", "nothing.jsonl"], "cannot be read as text"),
        (["--benchmark", "{}/quiz.txt", "--ngram", "99"], "no item has 99 words"),
        (["--benchmark", "{}/quiz.txt", "--ngram", "0"], "--ngram must be at least 1"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_compared_is_refused(
    corpus: Path, capfd: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    words = [word.format(corpus) for word in words]
    assert main(["data", "inspect", str(corpus / "corpus"), *words]) == 2
    assert says in capfd.readouterr().err
