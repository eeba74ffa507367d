"""Sources of raw text: what is read, in which order, and what counts as bad."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llmtrain.config.schema import TextSourceConfig
from llmtrain.data.sources import BadTally, documents, open_text_source
from llmtrain.data.sources.builtin import docstrings, library_files
from llmtrain.errors import DataError, EnvironmentFault


def read(limit=0.0, **settings):
    """(documents, tally, printed lines) of a source."""
    printed = []
    source = open_text_source("src", TextSourceConfig(**settings))
    tally = BadTally("src", limit, printed.append)
    return list(documents(source, tally)), tally, printed


def texts(**settings):
    return [document.text for document in read(**settings)[0]]


def pack(raw: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(raw[:7]) + gzip.compress(raw[7:])  # two members, as `cat` makes
    if ending == ".zst":
        compressor = zstandard.ZstdCompressor()
        return compressor.compress(raw[:7]) + compressor.compress(raw[7:])
    return raw


LINES = [f"line {i} " + "wörd " * (i % 50) for i in range(3000)]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_files_plain_and_compressed(tmp_path, kind, ending):
    if kind == "text":
        raw, name, want = "\n".join(LINES).encode(), "a.txt", ["\n".join(LINES)]
    elif kind == "jsonl":
        raw = "\n".join(json.dumps({"body": t, "n": 1}, ensure_ascii=False) for t in LINES).encode()
        name, want = "a.jsonl", LINES
    else:
        pq.write_table(
            pa.table({"n": range(3000), "body": LINES}), tmp_path / "x", row_group_size=700
        )
        raw, name, want = (tmp_path / "x").read_bytes(), "a.parquet", LINES
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(pack(raw, ending))
    assert texts(kind=kind, paths=[str(path)], field="body") == want
    source = open_text_source("s", TextSourceConfig(kind=kind, paths=[str(path)], field="body"))
    list(documents(source, BadTally("s", 0, print)))
    assert source.bytes_read == source.total_bytes == path.stat().st_size


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "not compressed", "flipped"])
def test_damaged_compression_names_the_file(tmp_path, ending, damage):
    good = pack(json.dumps({"text": "a" * 5000 + "b" * 500}).encode(), ending)
    middle = len(good) - 20
    bad = {
        "truncated": good[:-9],
        "not compressed": b"plain text",
        "flipped": good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :],
    }[damage]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(bad)
    with pytest.raises(DataError, match=r"a\.jsonl\.\w+ is damaged or truncated"):
        texts(kind="jsonl", paths=[str(path)])


def test_folders_globs_and_order(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "a.txt", "c/d/3.md", ".hidden/x.txt", "c/.y.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(name)
    root = str(tmp_path)
    everything = ["a.txt", "b/1.txt", "b/2.txt", "c/d/3.md"]
    assert texts(paths=[root]) == everything
    assert texts(paths=[f"{root}/**/*.txt"]) == everything[:3]
    assert texts(paths=[f"{root}/b", f"{root}/**/*"]) == ["b/1.txt", "b/2.txt", "a.txt", "c/d/3.md"]
    assert texts(paths=[f"{root}/c/d/3.md", f"{root}/a.txt"]) == ["c/d/3.md", "a.txt"]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "j"}'))
    assert texts(kind="jsonl", paths=[root]) == ["j"]


@pytest.mark.parametrize(
    ("kind", "paths", "message"),
    [
        ("text", [], "has no paths"),
        ("text", ["{root}/none*.txt"], "none"),
        ("jsonl", ["{root}"], "holds no .jsonl"),
        ("parquet", ["{root}/a.txt"], "a.txt is not a readable parquet file"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path, kind, paths, message):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=message) as error:
        texts(kind=kind, paths=[p.format(root=tmp_path) for p in paths])
    assert "\n" not in str(error.value)


def test_bad_lines_are_counted_with_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "byte order mark"}',
        b'{"text": "caf\xe9"}',
        b'{"text": ',
        b"",
        b'["text"]',
        b'{"title": "t"}',
        b'{"text": null}',
        b'{"text": 7}',
        b'{"text": " \\n\\t"}',
        b'{"text": "lone \\ud800 surrogate"}',
        '{"text": "gut ✓"}'.encode(),
    ]
    path.write_bytes(b"\n".join(lines))
    found, tally, printed = read(limit=1.0, kind="jsonl", paths=[str(path)])
    assert [(d.text, d.line) for d in found] == [("byte order mark", 1), ("gut ✓", 11)]
    counts = {"not UTF-8": 2, "not JSON": 1, "not a JSON object": 1, "missing field": 2}
    assert tally.counts() == {"records": 10, **counts, "wrong type": 1, "empty": 1}
    assert printed[0].startswith(f"src: {path}:2: not UTF-8: byte 0xe9")
    assert printed[1].startswith(f"src: {path}:3: not JSON")
    assert "'text': has title" in printed[3]
    assert len(printed) == 6
    assert "counted, not printed" in printed[5]


@pytest.mark.parametrize(("limit", "stops"), [(0.0, True), (0.19, True), (0.2, False)])
def test_too_many_bad_records_stop(tmp_path, limit, stops):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 4 + "oops\n")
    if not stops:
        assert len(read(limit=limit, kind="jsonl", paths=[str(path)])[0]) == 4
        return
    with pytest.raises(DataError, match=r"1 of 5 records are bad \(1 not JSON\).*a\.jsonl:5"):
        read(limit=limit, kind="jsonl", paths=[str(path)])


def test_bad_records_stop_a_long_source_early(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 12_000 + "oops\n" * 3000)
    with pytest.raises(DataError, match="1201 of 13201 records"):
        read(limit=1200.5 / 13201, kind="jsonl", paths=[str(path)])


def test_text_file_not_utf8_gives_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xffee")
    (tmp_path / "b.txt").write_bytes(b" \n")
    _, tally, printed = read(limit=1.0, paths=[str(tmp_path)])
    assert tally.kinds == {"not UTF-8": 1, "empty": 1}
    assert "a.txt:3: not UTF-8" in printed[0]


def column(values, kind):
    return pa.table({"text": pa.array(values, kind)})


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.binary(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)
def test_parquet_column_types(tmp_path, kind):
    values = ["ä", "bb", None, "", "bb"]
    if kind == pa.binary():
        values = [v if v is None else v.encode() for v in values]
    pq.write_table(column(values, kind), tmp_path / "a.parquet")
    found, tally, printed = read(limit=1.0, kind="parquet", paths=[str(tmp_path)])
    assert [(d.text, d.line) for d in found] == [("ä", 1), ("bb", 2), ("bb", 5)]
    assert tally.kinds == {"missing field": 1, "empty": 1}
    assert "a.parquet:3: missing field" in printed[0]


def test_parquet_rows_not_utf8(tmp_path):
    pq.write_table(column([b"ok", b"\xff"], pa.binary()), tmp_path / "a.parquet")
    found, tally, _ = read(limit=0.5, kind="parquet", paths=[str(tmp_path)])
    assert [d.text for d in found] == ["ok"]
    assert tally.kinds == {"not UTF-8": 1}


def test_parquet_wrong_column(tmp_path):
    pq.write_table(pa.table({"n": [1], "title": ["t"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text' but n, title"):
        texts(kind="parquet", paths=[str(tmp_path)])
    with pytest.raises(DataError, match=r"column 'n' .* is int64, not text"):
        texts(kind="parquet", paths=[str(tmp_path)], field="n")


def test_limits(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "é" * 5}) + "\n" for _ in range(20)))
    assert len(texts(kind="jsonl", paths=[str(path)], max_documents=7)) == 7
    assert len(texts(kind="jsonl", paths=[str(path)], max_bytes=31)) == 4  # 10 bytes each


@pytest.mark.parametrize("domain", ["code", "docs", "math"])
def test_builtin_is_deterministic_and_large_enough(domain):
    size = 400_000
    first = read(kind="builtin", domain=domain, max_bytes=size)[0]
    assert first == read(kind="builtin", domain=domain, max_bytes=size)[0]
    total = sum(len(d.text.encode()) for d in first)
    assert size <= total < size + max(len(d.text.encode()) for d in first)
    keys = [d.split_key for d in first if d.split_key]
    assert len(set(keys)) == len(keys)


def test_builtin_code_is_the_library_of_this_python():
    names = [name for name, _ in library_files()]
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py", "__future__.py"} <= set(names)
    assert not [
        n for n in names if "site-packages" in n or "pydoc_data" in n or "/_sysconfig" in f"/{n}"
    ]
    tests = [i for i, n in enumerate(names) if n.startswith("test/")]
    assert not tests or min(tests) > names.index("zipfile.py" if "zipfile.py" in names else "os.py")
    total = sum(Path(path).stat().st_size for _, path in library_files())
    assert total > 8_000_000


def test_docstrings_page():
    source = '"""Head."""\nclass A(B):\n    """About A."""\n    async def f(self, x: int = 3):\n'
    source += '        """Does.\n\n        More."""\n    def g(self): pass\ndef h(): "H."\n'
    assert docstrings("pkg/mod.py", source) == (
        "Module pkg.mod\n\nHead.\n\nclass A(B)\n    About A.\n\n"
        "async A.f(self, x: int=3)\n    Does.\n\n    More.\n\nh()\n    H.\n"
    )
    assert docstrings("a.py", "x = 1") == ""
    assert docstrings("a.py", "print 'old'") == ""


def test_unknown_domain():
    with pytest.raises(DataError, match="needs a domain"):
        texts(kind="builtin")


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("form", ["jsonl folder", "parquet folder", "file", "saved"])
def test_hf_local(hub_folder, form):
    rows = [{"body": f"doc {i}", "n": i} for i in range(25)]
    place = hub_folder
    if form == "parquet folder":
        pq.write_table(pa.Table.from_pylist(rows), hub_folder / "a.parquet")
    elif form == "saved":
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(str(hub_folder))
    else:
        (hub_folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        place = hub_folder / "a.jsonl" if form == "file" else hub_folder
    want = [row["body"] for row in rows]
    assert texts(kind="hf", hf_name=str(place), field="body") == want
    with pytest.raises(DataError, match="no column 'text' but body, n"):
        texts(kind="hf", hf_name=str(place))


def test_hf_faults_are_sentences(hub_folder, monkeypatch):
    import datasets

    with pytest.raises(DataError, match="needs hf_name"):
        texts(kind="hf")
    with pytest.raises(DataError, match="does not exist"):
        texts(kind="hf", hf_name=str(hub_folder / "none"))
    (hub_folder / "a.jsonl").write_text('{"text": "x"}')
    with pytest.raises(DataError, match=r"Bad split: test.*hf_split"):
        texts(kind="hf", hf_name=str(hub_folder), hf_split="test")

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"some/name failed .*the hub cannot be reached"):
        texts(kind="hf", hf_name="some/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'llmtrain\[hf\]'"):
        texts(kind="hf", hf_name="some/name")
