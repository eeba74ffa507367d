"""Filters by metadata: what is kept, what is counted, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli.main import main
from llmtrain.config.filters import FilterConfig
from llmtrain.config.schema import PrepareConfig, TextSourceConfig, TokenizerConfig
from llmtrain.data.corpus import read_manifest
from llmtrain.data.prepare import prepare
from llmtrain.data.sources import BadTally, documents, open_text_source
from llmtrain.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"text": "zero", "score": 0.9, "lang": "en", "meta": {"year": 2001}},
    {"text": "one", "score": 0.2, "lang": "en", "meta": {"year": 2010}},
    {"text": "two", "score": 0.5, "lang": "fr", "meta": {"year": 2020}},
    {"text": "three", "score": None, "lang": "de", "meta": {"year": 2021}},
    {"text": "four", "score": 0.7, "lang": "de", "meta": {"year": 1990}},
    {"text": "five", "score": 0.5, "lang": "en", "meta": {"year": 2000}},
]
CASES: list[tuple[dict[str, FilterConfig], list[str], dict[str, int]]] = [
    ({}, ["zero", "one", "two", "three", "four", "five"], {}),
    (
        {"score": FilterConfig(min=0.5)},
        ["zero", "two", "four", "five"],
        {"score": 1, "score missing": 1},
    ),
    (
        {"score": FilterConfig(min=0.5, max=0.7, missing="keep")},
        ["two", "three", "four", "five"],
        {"score": 2},
    ),
    (
        {"lang": FilterConfig(one_of=["en", "de"]), "meta.year": FilterConfig(min=2000)},
        ["zero", "one", "three", "five"],
        {"lang": 1, "meta.year": 1},
    ),
    ({"lang": FilterConfig(none_of=["en"])}, ["two", "three", "four"], {"lang": 3}),
]


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
@pytest.mark.parametrize(("keep", "texts", "dropped"), CASES)
def test_filters_keep_and_count(
    tmp_path: Path,
    kind: str,
    keep: dict[str, FilterConfig],
    texts: list[str],
    dropped: dict[str, int],
) -> None:
    path = write(tmp_path, "parquet" if kind == "parquet" else "jsonl", ROWS)
    if kind == "hf":
        pytest.importorskip("datasets")
        cfg = TextSourceConfig(kind="hf", hf_name=str(path), keep=keep)
    else:
        cfg = TextSourceConfig(kind=kind, paths=[str(path)], keep=keep)
    tally = BadTally("s", 0.0, print)
    assert [d.text for d in documents(open_text_source("s", cfg), tally)] == texts
    assert tally.dropped == dropped
    assert tally.records == len(ROWS) and not tally.bad


def test_a_score_that_is_no_number_is_bad_and_a_nan_is_dropped(tmp_path: Path) -> None:
    rows = [{"text": "a", "score": "high"}, {"text": "b", "score": math.nan}]
    rows += [{"text": "c", "score": True}, {"text": "d", "score": 3}]
    keep = {"score": FilterConfig(min=1)}
    path = write(tmp_path, "jsonl", rows)
    tally = BadTally("s", 1.0, print)
    cfg = TextSourceConfig(kind="jsonl", paths=[str(path)], keep=keep)
    assert [d.text for d in documents(open_text_source("s", cfg), tally)] == ["d"]
    assert tally.kinds == {"wrong type": 2} and tally.dropped == {"score": 1}


def corpus_config(folder: Path, keep: dict[str, FilterConfig]) -> PrepareConfig:
    rows = [{**ROWS[i % len(ROWS)], "text": f"document {i} " * 9} for i in range(90)]
    source = TextSourceConfig(kind="jsonl", paths=[str(write(folder, "jsonl", rows))], keep=keep)
    return PrepareConfig(
        out=str(folder / "corpus"),
        sources={"web": source},
        tokenizer=TokenizerConfig(kind="byte"),
        heldout_fraction=0.2,
        workers=1,
    )


def test_the_manifest_counts_what_was_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    cfg = corpus_config(tmp_path, {"score": FilterConfig(min=0.5), "lang": FilterConfig()})
    prepare(cfg, say=said.append)
    entry = prepare(cfg, say=said.append)["sources"]["web"]
    assert entry["dropped"] == {"score": 15, "score missing": 15}
    assert entry["train"]["documents"] + entry["heldout"]["documents"] == 60
    assert "filters dropped 30 (15 by score, 15 by score missing)" in " ".join(said)
    assert main(["data", "inspect", cfg.out, "--samples", "0"]) == 0
    assert "dropped by filters: 15 by score, 15 by score missing" in capsys.readouterr().out


def test_other_filters_are_another_corpus_and_none_are_the_old_settings(tmp_path: Path) -> None:
    cfg = corpus_config(tmp_path, {})
    prepare(cfg, say=lambda text: None)
    manifest = read_manifest(cfg.out)
    assert manifest is not None
    assert "keep" not in manifest["settings"]["sources"]["web"]  # as before there were filters
    with pytest.raises(DataError, match="other settings"):
        prepare(corpus_config(tmp_path, {"score": FilterConfig(min=0.1)}), say=lambda text: None)


def test_filters_that_leave_nothing_or_name_no_column_are_refused(tmp_path: Path) -> None:
    cfg = corpus_config(tmp_path, {"scores": FilterConfig(min=0.1)})
    with pytest.raises(DataError, match="its filters dropped 90 of 90"):
        prepare(cfg, say=lambda text: None)
    path = write(tmp_path, "parquet", ROWS)
    keep = {"scores": FilterConfig(min=0.1)}
    source = TextSourceConfig(kind="parquet", paths=[str(path)], keep=keep)
    with pytest.raises(DataError, match="no column 'scores' for its filter"):
        list(documents(open_text_source("s", source), BadTally("s", 0.0, print)))


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ("{score: {min: 2, max: 1}}", "min 2 is above max 1"),
        ("{score: {missing: keep}}", "drops nothing"),
        ("{score: {least: 2}}", "least: is not a key"),
    ],
)
def test_filters_that_mean_nothing_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], keep: str, says: str
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        f"prepare:\n  out: {tmp_path}/c\n  sources:\n    web: {{kind: jsonl, paths: [x], "
        f"keep: {keep}}}\n"
    )
    assert main(["data", "prepare", str(config)]) == 2
    assert says in capfd.readouterr().err
