"""Durations: how long, or when, in steps, tokens or fractions of the run.

Accepted everywhere a time is: ``100step``, ``300Mtok``, ``0.8dur``. Token counts take the
suffixes K, M, B, T (powers of ten). One step is one optimizer update.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_PATTERN = re.compile(r"^\s*(\d+(?:\.\d+)?(?:[eE]\+?\d+)?)\s*([KMBGT]?)\s*(step|tok|dur)s?\s*$")
HELP = "write a duration such as 100step, 300Mtok or 0.8dur"


@dataclass(frozen=True)
class Duration:
    """An amount with a unit.

    value: exact rational amount, already multiplied by the suffix. unit: ``step`` (optimizer
    updates), ``tok`` (tokens trained on) or ``dur`` (fraction of the whole run).
    """

    value: Fraction
    unit: str

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Parse ``text``; raises ValueError whose message says what to write instead."""
        match = _PATTERN.match(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"{text!r} is not a duration: {HELP}")
        number, suffix, unit = match.groups()
        value = Fraction(number) * _SCALE[suffix]
        if unit == "dur" and suffix:
            raise ValueError(f"{text!r}: a fraction of the run takes no suffix {suffix!r}")
        if unit == "step" and value.denominator != 1:
            raise ValueError(f"{text!r}: steps are whole numbers")
        return cls(value, unit)

    def __str__(self) -> str:
        if self.unit == "dur":
            return f"{float(self.value):g}dur"
        amount, suffix = self.value, ""
        if self.unit == "tok":
            for letter in ("T", "B", "M", "K"):
                if amount >= _SCALE[letter] and (amount / _SCALE[letter] * 1000).denominator == 1:
                    amount, suffix = amount / _SCALE[letter], letter
                    break
        number = str(amount.numerator) if amount.denominator == 1 else repr(float(amount))
        return f"{number}{suffix}{self.unit}"

    def steps(self, tokens_per_step: int, total_steps: int | None = None) -> int:
        """Number of optimizer steps, rounded up; ``dur`` needs ``total_steps``."""
        if self.unit == "step":
            return int(self.value)
        if self.unit == "tok":
            return -int(-self.value // tokens_per_step)
        if total_steps is None:
            raise ValueError("a fraction of the run has no length of its own here")
        return -int(-self.value * total_steps // 1)

    def samples(self, seq_len: int, batch: int, total_steps: int | None = None) -> int:
        """Number of samples (sequences): exact for tokens, whole global batches for steps."""
        if self.unit == "tok":
            return -int(-self.value // seq_len)
        if self.unit == "dur" and total_steps is not None:
            return -int(-self.value * total_steps * batch // 1)
        return self.steps(seq_len * batch, total_steps) * batch
