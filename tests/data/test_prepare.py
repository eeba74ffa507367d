"""Preparing a corpus: what is written, and what happens on faults and on a second run."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from llmtrain.config.schema import PrepareConfig, SourceConfig, TextSourceConfig, TokenizerConfig
from llmtrain.data import encode, mds_writer
from llmtrain.data import prepare as module
from llmtrain.data.encode import batches, encode_batch, is_heldout, split_long
from llmtrain.data.formats import open_source
from llmtrain.data.inspect import Inspection, inspect
from llmtrain.data.prepare import prepare
from llmtrain.data.sources import Document
from llmtrain.data.tokenizer import DEFAULT_EOS, load_tokenizer
from llmtrain.errors import ConfigError, DataError, EnvironmentFault

WORDS = ["alpha", "beta", "gamma", "delta", "émile", "東京", "one", "two", "three"]


@pytest.fixture(autouse=True)
def without_syncing(monkeypatch):
    """Waiting for a shared disk is slow; no test here cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def make_texts(count, seed=0):
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 90))) for _ in range(count)]
    return [*texts, f"speaks of {DEFAULT_EOS} and of {DEFAULT_EOS}"]


def write_jsonl(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


def read_jsonl(path):
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


@pytest.fixture
def config(tmp_path):
    """A function that makes a configuration of two small sources, with changes."""
    one = write_jsonl(tmp_path / "in/a.jsonl", make_texts(300))
    two = write_jsonl(tmp_path / "in/b.jsonl", make_texts(120, seed=1))

    def make(**changes):
        settings = {
            "out": str(tmp_path / "corpus"),
            "sources": {
                "first": TextSourceConfig(kind="jsonl", paths=[one]),
                "second": TextSourceConfig(kind="jsonl", paths=[two]),
            },
            "tokenizer": TokenizerConfig(kind="byte"),
            "heldout_fraction": 0.2,
            "shard_bytes": 9000,
            "workers": 1,
        }
        return PrepareConfig(**{**settings, **changes})

    return make


def quiet(_line):
    """Instead of print."""


def tree(folder):
    folder = Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read_documents(split, eos):
    """Documents of a split as lists of tokens, through the reader of the data room."""
    source = open_source("s", SourceConfig(path=str(split)), eos_id=None)
    tokens = source.read(0, source.num_tokens).tolist()
    assert tokens[-1] == eos
    found, current = [], []
    for token in tokens:
        if token == eos:
            found.append(current)
            current = []
        else:
            current.append(token)
    return found


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_every_document_is_there_once(config, tmp_path, kind, compression, monkeypatch):
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))
    cfg = config(tokenizer=TokenizerConfig(kind=kind, vocab_size=300), compression=compression)
    manifest = prepare(cfg, say=quiet)
    tokenizer = load_tokenizer(cfg.out)
    assert manifest["tokenizer"]["sha256"] == tokenizer.sha256
    assert (
        manifest["tokenizer"]["vocab_size"]
        == tokenizer.vocab_size
        == (300 if kind == "bpe" else 257)
    )
    for name, section in cfg.sources.items():
        texts = read_jsonl(section.paths[0])
        for split in ("train", "heldout"):
            want = [t for t in texts if is_heldout(t, 0.2) == (split == "heldout")]
            folder = Path(cfg.out, name, split)
            documents = read_documents(folder, tokenizer.eos_id)
            assert [tokenizer.decode(ids) for ids in documents] == want
            entry, note = (
                manifest["sources"][name][split],
                json.loads((folder / "stream.json").read_text()),
            )
            tokens = sum(len(ids) + 1 for ids in documents)
            assert entry["tokens"] == note["num_tokens"] == tokens
            assert entry["documents"] == note["documents"] == len(want)
            assert entry["bytes"] == note["bytes"] == sum(len(t.encode()) for t in want)
            assert entry["fingerprint"] == note["fingerprint"]
            assert (note["dtype"], note["chunk_tokens"]) == ("uint16", 1024)
            assert note["eos_id"] == tokenizer.eos_id
        assert manifest["sources"][name]["bad"] == {"records": len(texts)}
        assert manifest["sources"][name]["heldout"]["documents"] > 5


def test_unigram_numbers(config):
    manifest = prepare(config(), say=quiet)
    for name, entry in manifest["sources"].items():
        counts = {}
        for split in ("train", "heldout"):
            documents = read_documents(Path(config().out, name, split), 256)
            counts[split] = Counter(t for ids in documents for t in [*ids, 256])
            total = counts[split].total()
            bits = -sum(n / total * math.log(n / total) for n in counts[split].values())
            assert entry[split]["unigram_entropy_nats"] == pytest.approx(bits, rel=1e-12)
        train, held = counts["train"], counts["heldout"]
        loss = -sum(n * math.log((train[t] + 1) / (train.total() + 257)) for t, n in held.items())
        assert entry["heldout"]["unigram_loss_nats"] == pytest.approx(loss / held.total())


def test_split_is_a_function_of_the_text(config, tmp_path):
    """The same text falls on the same side in another order, corpus and version of Python."""
    sides = [is_heldout(f"text {i}", 0.1) for i in range(20_000)]
    assert 1850 < sum(sides) < 2150
    assert [i for i in range(60) if sides[i]] == [
        i for i in range(60) if is_heldout(f"text {i}", 0.1)
    ]
    assert is_heldout("", 1.0) and not is_heldout("", 0.0)
    assert all(is_heldout(f"text {i}", 0.3) for i in range(20_000) if sides[i])


def test_split_key_decides_for_the_text():
    documents = [Document(f"text {i}", "p", i, split_key="k") for i in range(50)]
    (batch,) = batches(documents)
    tokenizer = byte_tokenizer()
    for fraction in (0.0, 1.0):
        encoded = encode_batch(tokenizer, batch, fraction)
        assert (encoded.train.documents, encoded.heldout.documents) == (
            (50, 0) if fraction == 0 else (0, 50)
        )
    halves = encode_batch(tokenizer, batch, 0.5)
    assert 0 in (halves.train.documents, halves.heldout.documents)


def byte_tokenizer():
    from llmtrain.data.tokenizer import ByteTokenizer

    return ByteTokenizer(DEFAULT_EOS, "")


@pytest.mark.parametrize("limit", [7, 50, 1 << 19])
def test_long_texts_are_cut_without_loss(limit):
    rng = random.Random(limit)
    for text in ["", "x" * 120, "ab cd " * 40, "line\n" * 30, "".join(rng.choices("ab \n", k=333))]:
        pieces = split_long(text, limit)
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= limit
    assert split_long("aa bb\ncc dd", 8) == ["aa bb\n", "cc dd"]
    assert split_long("aaa bbb ccc", 8) == ["aaa bbb", " ccc"]


def test_no_heldout_and_no_documents(config):
    manifest = prepare(config(heldout_fraction=0.0), say=quiet)
    held = manifest["sources"]["first"]["heldout"]
    assert (held["documents"], held["tokens"], held["unigram_loss_nats"]) == (0, 0, 0.0)
    with pytest.raises(DataError, match="'first' has no documents to train on"):
        prepare(config(heldout_fraction=0.9999999, out=config().out + "2"), say=quiet)


def test_wide_vocabulary_takes_uint32(config, tmp_path):
    vocab = {w: 70_000 + i for i, w in enumerate(WORDS)} | {"[UNK]": 0}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    path = str(tmp_path / "tokenizer.json")
    cfg = config(tokenizer=TokenizerConfig(kind="file", path=path), heldout_fraction=0.0)
    manifest = prepare(cfg, say=quiet)
    eos = manifest["tokenizer"]["eos_id"]
    assert manifest["tokenizer"]["eos_token"] == "</s>"
    text = read_jsonl(cfg.sources["first"].paths[0])[0]
    documents = read_documents(Path(cfg.out, "first", "train"), eos)
    assert documents[0] == [vocab[w] for w in text.split()]
    assert json.loads(Path(cfg.out, "first/train/stream.json").read_text())["dtype"] == "uint32"
    assert Path(cfg.out, "tokenizer.json").read_bytes() == Path(path).read_bytes()


def test_complete_corpus_is_left_alone(config):
    first, lines = prepare(config(), say=quiet), []
    before = {p: p.stat().st_mtime_ns for p in Path(config().out).rglob("*")}
    assert prepare(config(workers=3, max_bad_fraction=0.5), say=lines.append) == first
    assert {p: p.stat().st_mtime_ns for p in Path(config().out).rglob("*")} == before
    assert len(lines) == 1
    assert "already complete" in lines[0]


def test_other_settings_are_named(config, tmp_path):
    prepare(config(), say=quiet)
    content = tree(config().out)
    other = config(tokenizer=TokenizerConfig(kind="bpe", vocab_size=300), heldout_fraction=0.1)
    with pytest.raises(DataError) as error:
        prepare(other, say=quiet)
    for part in (
        "heldout_fraction was 0.2, now 0.1",
        'tokenizer.kind was "byte", now "bpe"',
        "--force",
    ):
        assert part in str(error.value)
    with open(tmp_path / "in/a.jsonl", "a") as file:
        file.write('{"text": "new"}\n')
    with pytest.raises(DataError, match=r"prepare\.sources\.first\.bytes was"):
        prepare(config(), say=quiet)
    assert tree(config().out) == content


def test_force_replaces_once_complete(config, tmp_path):
    prepare(config(), say=quiet)
    old = tree(config().out)
    third = TextSourceConfig(kind="jsonl", paths=[write_jsonl(tmp_path / "c.jsonl", ["x"] * 9)])
    new = config(sources={"third": third}, heldout_fraction=0.0)
    broken = TextSourceConfig(kind="jsonl", paths=[write_jsonl(tmp_path / "d.jsonl", [1])])
    with pytest.raises(DataError, match="1 of 1 records"):
        prepare(config(sources={"third": third, "d": broken}), force=True, say=quiet)
    assert {k: v for k, v in tree(config().out).items() if not k.startswith(".partial")} == old
    prepare(new, force=True, say=quiet)
    assert {p.name for p in Path(new.out).iterdir()} == {
        *("third", "manifest.json", "tokenizer.json", "tokenizer_config.json")
    }
    lines = []
    prepare(new, force=True, say=lines.append)
    assert any(line.startswith("third: 9 documents") for line in lines)


def test_bad_records_publish_nothing(config, tmp_path):
    bad = write_jsonl(tmp_path / "bad.jsonl", [*(f"fine {i}" for i in range(50)), None])
    source = {"s": TextSourceConfig(kind="jsonl", paths=[bad])}
    lines = []
    with pytest.raises(DataError, match=r"1 of 51 records are bad \(1 missing field\)"):
        prepare(config(sources=source, max_bad_fraction=0.0), say=lines.append)
    assert f"s: {bad}:51: missing field: 'text': null" in lines
    assert [p.name for p in Path(config().out).iterdir()] == [".partial"]
    manifest = prepare(config(sources=source, max_bad_fraction=0.02), say=lines.append)
    assert manifest["sources"]["s"]["bad"] == {"records": 51, "missing field": 1}
    assert "1 of 51 records bad" in lines[-1]


def test_a_folder_with_other_files_is_refused(config):
    out = Path(config().out)
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="holds files that are no corpus"):
        prepare(config(), force=True, say=quiet)
    assert tree(out) == {"thesis.txt": b"precious"}


def test_damaged_manifest(config):
    prepare(config(), say=quiet)
    good = tree(config().out)
    path = Path(config().out, "manifest.json")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"manifest\.json is damaged .*--force"):
        prepare(config(), say=quiet)
    prepare(config(), force=True, say=quiet)
    assert tree(config().out) == good


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {}}, "prepare.sources is empty"),
        ({"sources": {"../x": TextSourceConfig()}}, "'../x' becomes a folder"),
        ({"sources": {"manifest.json": TextSourceConfig()}}, "becomes a folder"),
        ({"compression": "lz4"}, "prepare.compression"),
        ({"shard_bytes": 1 << 32}, "prepare.shard_bytes"),
        ({"tokenizer": TokenizerConfig(kind="file")}, "prepare.tokenizer.path is missing"),
        ({"tokenizer": TokenizerConfig(kind="file", path="/no/such")}, "no tokenizer at /no/such"),
    ],
)
def test_impossible_settings(config, changes, message):
    with pytest.raises((ConfigError, DataError), match=message):
        prepare(config(**changes), say=quiet)
    assert not Path(config().out).exists()


@pytest.mark.parametrize("when", [1, 5, 20, 40])
def test_full_disk_is_a_sentence_and_the_rerun_finishes(config, monkeypatch, when):
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(encode, "BATCH_DOCUMENTS", 20)
    prepare(config(), say=quiet)
    want = tree(config().out)
    cfg = config(out=config().out + "2")
    calls, real = [0], os.fsync

    def full(descriptor):
        calls[0] += 1
        if calls[0] >= when:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(mds_writer.os, "fsync", full)
    with pytest.raises(EnvironmentFault, match=r"no space left to write .*same command again"):
        prepare(cfg, say=quiet)
    monkeypatch.setattr(mds_writer.os, "fsync", real)
    lines = []
    prepare(cfg, say=lines.append)
    assert tree(cfg.out) == want
    assert any("continuing after" in line for line in lines) or when != 20


def test_folder_that_cannot_be_written(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentFault, match=r"cannot write .*Not a directory"):
        prepare(config(out=str(tmp_path / "file/corpus")), say=quiet)

    def read_only(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(EnvironmentFault, match=r"cannot write .*Read-only .*prepare.out"):
        prepare(config(), say=quiet)


def test_only_one_process_prepares(config):
    partial = Path(config().out, ".partial")
    partial.mkdir(parents=True)
    with open(partial / "lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(EnvironmentFault, match="another process is preparing"):
            prepare(config(), say=quiet)
    prepare(config(), say=quiet)


def test_interrupted_work_of_other_settings_is_discarded(config, monkeypatch):
    prepare(config(), say=quiet)
    want = tree(config().out)
    cfg = config(out=config().out + "2")
    monkeypatch.setattr(module, "publish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(config(out=cfg.out, shard_bytes=5000), say=quiet)
    monkeypatch.undo()
    lines = []
    prepare(cfg, say=lines.append)
    assert "other settings" in lines[0]
    assert tree(cfg.out) == want


def test_training_text_of_the_tokenizer_is_not_held_out(config, monkeypatch):
    seen = []

    def spy(texts, *args):
        seen.extend(texts)
        return real([*seen], *args)

    real = module.train_tokenizer
    monkeypatch.setattr(module, "train_tokenizer", spy)
    prepare(config(tokenizer=TokenizerConfig(vocab_size=260, train_bytes=20_000)), say=quiet)
    assert not [t for t in seen if is_heldout(t, 0.2)]
    assert 20_000 <= sum(len(t.encode()) for t in seen) < 22_000


def test_inspect_corpus_and_split(config):
    manifest = prepare(config(tokenizer=TokenizerConfig(vocab_size=300)), say=quiet)
    report = "\n".join(inspect(Inspection(SourceConfig(path=config().out), verify=True)))
    train = manifest["sources"]["first"]["train"]
    assert f"first/train: {train['documents']} documents, {train['tokens']:,} tokens" in report
    loss = manifest["sources"]["first"]["heldout"]["unigram_loss_nats"]
    assert f"loss under the train unigram {loss:.3f} nats/token" in report
    assert "verified:" in report
    text = read_jsonl(config().sources["first"].paths[0])[0]
    split = SourceConfig(path=str(Path(config().out, "first/train")))
    alone = "\n".join(inspect(Inspection(split)))
    assert f"{train['tokens']:,} tokens, {train['documents']} documents" in alone
    assert f"{train['unigram_entropy_nats']:.3f} nats/token" in alone
    assert text[:20] in alone or is_heldout(text, 0.2)


def test_inspect_finds_a_flipped_byte(config):
    prepare(config(), say=quiet)
    shard = Path(config().out, "second/train/shard.00001.mds")
    content = bytearray(shard.read_bytes())
    content[5000] ^= 4
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"second/train/shard\.00001\.mds"):
        list(inspect(Inspection(SourceConfig(path=config().out), verify=True)))


def test_inspect_of_plain_tokens(tmp_path):
    np.save(tmp_path / "t.npy", np.array([5, 6, 1, 7, 5, 1], np.uint16))
    lines = list(inspect(Inspection(SourceConfig(path=str(tmp_path / "t.npy")), eos_id=1)))
    assert "6 tokens, 2 documents" in lines[0]
    assert "largest id 7" in lines[1]
    assert any("token 3: 7 5 1" in line for line in lines)
