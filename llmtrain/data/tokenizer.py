"""Tokenizers: byte-level BPE through ``tokenizers``, or plain UTF-8 bytes.

Both have the same face. Text never becomes the document separator: a document that contains the
literal ``<|endoftext|>`` is encoded as those characters, so only ``prepare`` ends documents.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmtrain.errors import DataError

FILE = "tokenizer.json"
DEFAULT_EOS = "<|endoftext|>"
CONFIG_FILE = "tokenizer_config.json"  # Hugging Face's file beside it, which names the eos token
TEMPLATE_FILE = "chat_template.jinja"  # and the one that writes conversations
_KNOWN_EOS = (DEFAULT_EOS, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")

# Words with the character before them, single digits, runs of signs with their line end, indents.
_SPLIT = (
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


class Marked(NamedTuple):
    """Tokens of a text and the characters [begin, end) that each stands for. All int64 [n]."""

    ids: NDArray[np.int64]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]


class Tokenizer(ABC):
    """Text to token ids and back.

    kind: ``bpe`` or ``byte``. vocab_size: one more than the largest id. eos_id, eos_token: the
    document separator. sha256: of the file's bytes, hexadecimal. special_texts: the texts of its
    special tokens.
    """

    kind: str
    vocab_size: int
    eos_id: int
    eos_token: str
    sha256: str
    special_texts: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without eos."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""

    @abstractmethod
    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """As ``encode_batch``, as arrays."""

    @abstractmethod
    def encode_marked(self, texts: Sequence[str]) -> list[Marked]:
        """Token ids of each text, in which the texts of special tokens become these tokens."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids`` without eos and ids beyond the vocabulary; broken UTF-8 is U+FFFD."""


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8, 256 is eos."""

    kind = "byte"
    vocab_size = 257
    eos_id = 256

    def __init__(self, eos_token: str, sha256: str) -> None:
        self.eos_token = eos_token
        self.sha256 = sha256
        self.special_texts = (eos_token,)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def encode_marked(self, texts: Sequence[str]) -> list[Marked]:
        return [self._marked(text) for text in texts]

    def _marked(self, text: str) -> Marked:
        ids, begins, ends, at = [], [], [], 0
        for number, part in enumerate(text.split(self.eos_token)):
            if number:
                ids.append(np.array([self.eos_id]))
                begins.append(np.array([at]))
                at += len(self.eos_token)
                ends.append(np.array([at]))
            sizes = [len(char.encode()) for char in part]
            chars = np.repeat(np.arange(at, at + len(part)), sizes)
            ids.append(np.frombuffer(part.encode(), np.uint8).astype(np.int64))
            begins.append(chars)
            ends.append(chars + 1)
            at += len(part)
        return Marked(*(np.concatenate(found).astype(np.int64) for found in (ids, begins, ends)))

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


class BpeTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` library, whatever its model."""

    kind = "bpe"

    def __init__(self, inner: Any, eos_token: str, sha256: str) -> None:
        inner.encode_special_tokens = True  # special tokens written in a text stay text
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        self.eos_token = eos_token
        self.eos_id = int(inner.token_to_id(eos_token))
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.sha256 = sha256
        added = inner.get_added_tokens_decoder().values()
        self.special_texts = tuple(token.content for token in added if token.special)
        self._marking: Any = None

    def encode_marked(self, texts: Sequence[str]) -> list[Marked]:
        if self._marking is None:
            self._marking = _with_special_tokens(self._inner)
        encodings = self._marking.encode_batch(list(texts), add_special_tokens=False)
        found = []
        for encoding in encodings:
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            found.append(Marked(np.array(encoding.ids, np.int64), offsets[:, 0], offsets[:, 1]))
        return found

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.array(ids, np.uint32) for ids in self.encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocab_size and i != self.eos_id]
        return str(self._inner.decode(known, skip_special_tokens=True))


def _with_special_tokens(inner: Any) -> Any:
    """A copy of a library tokenizer that reads special tokens in texts, and whose offsets are
    those of whole tokens: the post-processor, which would cut blanks off them, is left out."""
    import tokenizers

    content = json.loads(inner.to_str())
    content["post_processor"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def load_tokenizer(path: str | Path, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer in the file ``path``, or in ``tokenizer.json`` of the folder ``path``.

    ``eos_token`` names the document separator. Without it: the one ``tokenizer_config.json``
    beside the file names, else a well-known one, else the only special token. Raises DataError
    for a missing or damaged file, an eos that is not in the vocabulary, and one that plain text
    can spell.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / FILE
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"no tokenizer at {file}; give a tokenizer.json or a folder that holds one"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {file}: {error.strerror}") from error
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        parsed = json.loads(content)
        if not isinstance(parsed, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise _damaged(file, error) from error
    if parsed.get("kind") == "byte":
        return ByteTokenizer(str(parsed.get("eos_token", DEFAULT_EOS)), sha256)
    return _load_bpe(file, content, parsed, eos_token, sha256)


def _load_bpe(
    file: Path, content: bytes, parsed: dict[str, Any], eos_token: str | None, sha256: str
) -> BpeTokenizer:
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise _damaged(file, error) from error
    wanted = eos_token or _configured_eos(file) or _only_eos(parsed)
    if wanted is None or inner.token_to_id(wanted) is None:
        special = [t["content"] for t in parsed.get("added_tokens", []) if t.get("special")]
        have = ", ".join(special[:8]) or "none"
        what = f"eos token {wanted!r} is not" if wanted else "no eos token is known"
        raise DataError(
            f"tokenizer {file}: {what} in its vocabulary (special tokens: {have});"
            " set prepare.tokenizer.eos_token"
        )
    tokenizer = BpeTokenizer(inner, wanted, sha256)
    if tokenizer.eos_id in tokenizer.encode(f"a {wanted} b {wanted}"):
        raise DataError(
            f"tokenizer {file}: text can spell its eos token {wanted!r}, which must be a special"
            " token; set prepare.tokenizer.eos_token to another"
        )
    return tokenizer


def _damaged(file: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200]
    return DataError(f"tokenizer {file} is damaged or of an unknown kind ({reason}); replace it")


def _configured_eos(file: Path) -> str | None:
    """The eos token that Hugging Face's own file beside the tokenizer names."""
    try:
        config = json.loads((file.parent / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    eos = config.get("eos_token") if isinstance(config, dict) else None
    if isinstance(eos, dict):  # an AddedToken written out
        eos = eos.get("content")
    return eos if isinstance(eos, str) else None


def _only_eos(parsed: dict[str, Any]) -> str | None:
    special = [t["content"] for t in parsed.get("added_tokens", []) if t.get("special")]
    for known in _KNOWN_EOS:
        if known in special:
            return known
    return special[0] if len(special) == 1 else None


def byte_tokenizer_file(eos_token: str) -> bytes:
    """Content of the ``tokenizer.json`` of a byte-level corpus."""
    fields = {"kind": "byte", "version": 1, "vocab_size": 257, "eos_id": 256}
    return (json.dumps({**fields, "eos_token": eos_token}, indent=1) + "\n").encode()


def tokenizer_config_file(eos_token: str, names: Mapping[str, str] | None = None) -> bytes:
    """Content of a ``tokenizer_config.json`` with which ``transformers`` opens the same folder.

    names: further special tokens by name, such as bos_token.
    """
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos_token}
    fields |= names or {}
    return (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode()


def train_tokenizer(texts: Iterable[str], vocab_size: int, eos_token: str) -> bytes:
    """Content of a ``tokenizer.json``: byte-level BPE trained on ``texts``, eos being id 0.

    The alphabet is all 256 bytes, so any text has an encoding and decodes to itself. The same
    texts give the same file. Fewer than ``vocab_size`` tokens come out of too little text.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Inner

    level = pre_tokenizers.ByteLevel
    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            level(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos_token],
        initial_alphabet=sorted(level.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(iter(texts), trainer)
    return str(inner.to_str()).encode()
