"""A small subset that is repeated in the first part of a run: ``data.diet``.

Paul et al. 2022 (2206.01278) find matching lottery tickets after such a phase. A step of the diet
draws the tokens of an earlier one, the first ``samples`` of the order again and again; from
``until`` on every step draws its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.schema import RunConfig
from llmtrain.data.mixture import Mixture
from llmtrain.errors import DataError


@dataclass(frozen=True)
class Diet:
    """Global samples before ``until`` draw the first ``samples`` in turns."""

    samples: int = 1
    until: int = 0

    @classmethod
    def of(cls, cfg: RunConfig) -> Diet:
        """That of a run; one that repeats nothing where ``data.diet`` is null."""
        diet, batch = cfg.data.diet, cfg.train.global_batch_size
        if diet is None:
            return cls()
        tokens = batch * cfg.data.seq_len
        return cls(diet.samples, diet.until.steps(tokens, cfg.train.duration.steps(tokens)) * batch)

    def drawn(self, sample: int) -> int:
        """The sample of the order that stands at global ``sample``."""
        return sample % self.samples if sample < self.until else sample

    def turn(self, sample: int, stop: int) -> int:
        """Up to where samples [sample, stop) follow each other in the order."""
        if sample >= self.until:
            return stop
        return min(self.until, sample - sample % self.samples + self.samples, stop)

    def counts(self, mixture: Mixture, i: int) -> NDArray[np.int64]:
        """Samples of each source among the first ``i`` that are drawn: [sources] int64."""
        repeated = min(i, self.until)
        rounds, rest = divmod(repeated, self.samples)
        found = mixture.counts(i) - mixture.counts(repeated) + mixture.counts(rest)
        return found + (rounds * mixture.counts(self.samples) if rounds else 0)

    def state(self) -> dict[str, Any] | None:
        """JSON values for checkpoints; None where nothing is repeated."""
        return {"samples": self.samples, "until": self.until} if self._repeats(self.until) else None

    def _repeats(self, consumed: int) -> bool:
        return min(self.until, consumed) > self.samples

    def check_resume(self, old: dict[str, Any] | None, consumed: int, batch: int) -> None:
        """Raise DataError where the first ``consumed`` samples were drawn by another diet.

        old: ``state`` of then. batch: of the run, in samples.
        """
        earlier = Diet() if old is None else Diet(**old)
        if earlier._past(consumed) == self._past(consumed):
            return
        then = "null"
        if earlier._repeats(consumed):
            then = f"{{samples: {earlier.samples}, until: {earlier.until // batch}step}}"
        raise DataError(
            "data.diet: the checkpoint's samples were drawn by another diet than the config's, "
            f"which would change samples already seen; resume with data.diet={then} (an end in "
            "dur moves with train.duration)"
        )

    def _past(self, consumed: int) -> tuple[int, int] | None:
        """What the diet made of the first ``consumed`` samples."""
        if not self._repeats(consumed):
            return None
        return self.samples, min(self.until, consumed)
