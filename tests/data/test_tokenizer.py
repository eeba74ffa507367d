"""Tokenizers: round trips, determinism, and text that spells the separator."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

import llmtrain
from llmtrain.data.tokenizer import (
    DEFAULT_EOS,
    byte_tokenizer_file,
    load_tokenizer,
    tokenizer_config_file,
    train_tokenizer,
)
from llmtrain.errors import DataError

CORPUS = [
    "def add(first, second):\n    return first + second\n" * 3,
    "Straße, naïve, 東京 and emoji 😀😀.\r\n\r\n\tTabs  and   spaces.",
    "1234 + 5678 = 6912. It's they're we've.",
    f"documents may speak of {DEFAULT_EOS} as text " * 5,
]


def hard_texts():
    rng = random.Random(3)
    anything = [chr(c) for c in range(0xD800)] + [chr(c) for c in range(0xE000, 0x20000)]
    texts = ["".join(rng.choices(anything, k=rng.randint(1, 300))) for _ in range(40)]
    return [*texts, *CORPUS, "\x00\x01", "\n\n\n   \n", "e\u0301", "\ufeffbom", DEFAULT_EOS, "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_bytes(train_tokenizer(CORPUS, 340, DEFAULT_EOS))
    return folder


@pytest.fixture(params=["bpe", "byte"])
def tokenizer(request, folder, tmp_path):
    if request.param == "bpe":
        return load_tokenizer(folder)
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer_file(DEFAULT_EOS))
    return load_tokenizer(tmp_path / "tokenizer.json")


def test_round_trip_of_any_text(tokenizer):
    texts = hard_texts()
    batch = tokenizer.encode_batch(texts)
    for text, ids, array in zip(texts, batch, tokenizer.encode_arrays(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer.encode(text) == array.tolist()
        assert tokenizer.eos_id not in ids
        assert 0 <= min(ids) <= max(ids) < tokenizer.vocab_size


def test_decode_leaves_out_eos_and_unknown_ids(tokenizer):
    ids = tokenizer.encode("left")
    mixed = [tokenizer.eos_id, *ids, tokenizer.vocab_size, 10**6, -1, tokenizer.eos_id]
    assert tokenizer.decode(mixed) == "left"
    assert tokenizer.decode([]) == ""


def test_half_a_character_decodes(tokenizer):
    ids = tokenizer.encode("😀")
    assert "\ufffd" in tokenizer.decode(ids[:1]) or len(ids) == 1


def test_byte_ids_are_bytes(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer_file("<end>"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("aß") == list("aß".encode())
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id) == ("byte", 257, 256)
    assert tokenizer.eos_token == "<end>"


def test_trained_vocabulary(folder):
    tokenizer = load_tokenizer(folder)
    content = (folder / "tokenizer.json").read_bytes()
    assert tokenizer.vocab_size == 340
    assert (tokenizer.eos_id, tokenizer.eos_token, tokenizer.kind) == (0, DEFAULT_EOS, "bpe")
    assert tokenizer.sha256 == hashlib.sha256(content).hexdigest()
    assert len(tokenizer.encode("def add(first, second)")) < 10
    assert len(tokenizer.encode("1234")) == 4  # digits stay single


def test_training_is_deterministic_across_processes(folder):
    code = (
        "import sys; from llmtrain.data.tokenizer import train_tokenizer;"
        f"sys.stdout.buffer.write(train_tokenizer({CORPUS!r}, 340, {DEFAULT_EOS!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(llmtrain.__file__).parents[1])}
    command = [sys.executable, "-c", code]
    again = subprocess.run(command, capture_output=True, check=True, env=environment)
    assert again.stdout == (folder / "tokenizer.json").read_bytes()


def test_transformers_opens_the_same_folder(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    content = (folder / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_bytes(tokenizer_config_file(DEFAULT_EOS))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert theirs.eos_token_id == ours.eos_id
    for text in ["def add(first):\n\n    return 12", "naïve 😀"]:
        assert theirs(text)["input_ids"] == ours.encode(text)


def other_file(folder, special, **config):
    """A tokenizer file of foreign make with the given special tokens."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, "[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(special)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="[UNK] $A", special_tokens=[("[UNK]", 0)]
    )
    inner.enable_padding(length=32)
    inner.enable_truncation(2)
    inner.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_foreign_file_adds_nothing_and_cuts_nothing(tmp_path):
    tokenizer = load_tokenizer(other_file(tmp_path, ["</s>"]))
    assert tokenizer.encode("a b b a") == [1, 2, 2, 1]
    assert (tokenizer.eos_token, tokenizer.eos_id, tokenizer.vocab_size) == ("</s>", 3, 4)


@pytest.mark.parametrize(
    ("special", "config", "asked", "found"),
    [
        (["<s>", "</s>"], {}, None, "</s>"),
        (["[END]"], {}, None, "[END]"),
        (["</s>", "[END]"], {}, "[END]", "[END]"),
        (["</s>", "[END]"], {"eos_token": "[END]"}, None, "[END]"),
        (["</s>", "[END]"], {"eos_token": {"content": "[END]"}}, None, "[END]"),
        (["</s>", "[END]"], {"eos_token": "[END]"}, "</s>", "</s>"),
    ],
)
def test_which_token_is_eos(tmp_path, special, config, asked, found):
    assert load_tokenizer(other_file(tmp_path, special, **config), asked).eos_token == found


def test_eos_that_text_can_spell_is_refused(tmp_path):
    with pytest.raises(DataError, match="text can spell its eos token 'a'"):
        load_tokenizer(other_file(tmp_path, ["[END]"]), "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no tokenizer at .*tokenizer.json"),
        (b"", "damaged"),
        (b"[1]", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b'{"model": {"type": "Nothing"}}', "damaged"),
    ],
)
def test_missing_and_damaged_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_damaged(folder, tmp_path):
    content = (folder / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="damaged"):
        load_tokenizer(tmp_path)


def test_no_known_eos(tmp_path):
    other_file(tmp_path, ["<x>", "<y>"])
    with pytest.raises(DataError, match=r"no eos token is known .*<x>, <y>.*eos_token"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="'<z>' is not in its vocabulary"):
        load_tokenizer(tmp_path, "<z>")
