"""Which samples of a source are trained on, and with what weight, from their scores.

What is selected are the loader's own samples: windows of ``seq_len`` tokens of the source's
stream, since those are what a step weighs and what an epoch counts; whole documents are selected
when a corpus is prepared. The kept samples take the place of the source: epochs, order, repetition
caps and the mixture go over them, so all that holds of a source holds of a selection. It is a pure
function of the seed, the scores and the section ``data.select``.

Window with an offset: Paul, Ganguli and Dziugaite 2021, 2107.07075, section 4. Gumbel-top-k: as
MATES selects (Yu, Das and Xiong 2024, 2406.06046), which is sampling without replacement with
probabilities softmax(score / temperature) (Kool, van Hoof and Welling 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmtrain.config.selection import SelectConfig
from llmtrain.data.order import mix, stream_key
from llmtrain.data.scores import check_scores, read_header, read_scores
from llmtrain.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Facts:
    """A source as a selection sees it. samples: of an epoch, without selection."""

    name: str
    fingerprint: str
    samples: int


@dataclass(frozen=True)
class Selection:
    """kept: [n] ascending sample numbers, of ``whole`` in the source. weights: [n] float32 factors
    of the loss weights with mean 1, None where all weigh alike. text: how they were chosen."""

    kept: NDArray[np.unsignedinteger[Any]]
    weights: NDArray[np.float32] | None
    whole: int
    text: str

    @property
    def size(self) -> int:
        """Samples of an epoch."""
        return len(self.kept)

    def state(self) -> dict[str, Any]:
        """JSON values that identify the selection."""
        digest = xxhash.xxh64(self.kept.astype("<u8").tobytes())
        if self.weights is not None:
            digest.update(self.weights.astype("<f4").tobytes())
        return {"samples": self.size, "fingerprint": digest.hexdigest()}

    def numbers(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample numbers within the source of the selection's samples ``places``."""
        return self.kept[places].astype(np.int64)

    def factors(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """Factors of the loss weights of the selection's samples ``places``."""
        if self.weights is None:
            return np.ones(len(places), np.float32)
        return self.weights[places]


def select(
    section: SelectConfig | None, seed: int, seq_len: int, sources: Sequence[Facts]
) -> list[Selection | None]:
    """The selection of each source, None where all of it is used.

    Raises DataError for a score file that is missing, damaged or of other data.
    """
    if section is None:
        return [None] * len(sources)
    chosen = section.sources or [source.name for source in sources]
    file = None if section.scores is None else Path(section.scores)
    header = None if file is None else _named(read_header, file)
    out: list[Selection | None] = []
    for source in sources:
        if source.name not in chosen or source.samples == 0:
            out.append(None)
            continue
        scores = None
        if file is not None and header is not None:
            where = f"data.select.scores: {file}"
            name = check_scores(where, header, source.name, source.fingerprint, seq_len)
            scores = _named(read_scores, file, name)
        method = "" if header is None else f" of {header['method']}"
        out.append(choose(section, seed, source, scores, method))
    return out


def choose(
    section: SelectConfig,
    seed: int,
    source: Facts,
    scores: NDArray[np.float64] | None,
    method: str = "",
) -> Selection:
    """Select from one source. scores: [samples], None for mode random. method: for the text.

    Samples without a score (none of their tokens counts) come last in every order. Raises
    DataError where no sample has one.
    """
    n = source.samples
    number = max(1, round(Fraction(str(section.keep)) * n))
    if section.mode == "random" or scores is None:
        key = stream_key(seed, "select", source.name)
        order = np.argsort(mix(np.arange(n, dtype=np.uint64), key), kind="stable")
        return _selection(order[:number], None, n, "at random")
    best = scores if section.order == "highest" else -scores
    known = np.isfinite(best)
    if not known.any():
        raise DataError(
            f"data.select.scores: {section.scores} has no finite score of the source "
            f"{source.name!r}; score it again"
        )
    if section.mode == "weights":
        power = np.exp((best - best[known].max()) / section.temperature)
        weights = np.where(known, power, 0.0)
        weights *= n / weights.sum()
        text = f"weighted by the {section.order} scores{method}"
        return _selection(np.arange(n), weights.astype(np.float32), n, text)
    if section.mode == "gumbel":
        best = best / section.temperature + _gumbel(seed, source.name, n)
        text = f"drawn by the {section.order} scores{method}"
        skip = 0
    else:
        skip = round(Fraction(str(section.offset)) * n)
        text = f"the {section.order} scores{method}"
        text += f" behind the first {skip:,}" if skip else ""
    order = np.argsort(np.where(known, -best, np.inf), kind="stable")
    return _selection(order[skip : skip + number], None, n, text)


def _named(read: Callable[..., T], *arguments: object) -> T:
    """What ``read`` returns; the DataError it raises names the key."""
    try:
        return read(*arguments)
    except DataError as error:
        raise DataError(f"data.select.scores: {error}") from error


def _gumbel(seed: int, name: str, n: int) -> NDArray[np.float64]:
    """Gumbel variables of samples 0..n-1, each from its own number."""
    bits = mix(np.arange(n, dtype=np.uint64), stream_key(seed, "gumbel", name)) >> np.uint64(11)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53
    return np.asarray(-np.log(-np.log(uniform)), np.float64)


def _selection(
    kept: NDArray[np.int64], weights: NDArray[np.float32] | None, whole: int, text: str
) -> Selection:
    narrow = np.uint32 if whole <= 1 << 32 else np.uint64
    return Selection(np.sort(kept).astype(narrow), weights, whole, text)
