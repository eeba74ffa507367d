"""Durations: how long, or when, in steps, tokens or fractions of the run.

Accepted everywhere a time is: ``100step``, ``300Mtok``, ``0.8dur``, ``2/3dur``. Counts take the
suffixes K, M, B, T (powers of ten). One step is one optimizer update. Amounts are exact
fractions and are written back exactly, so a duration survives any number of round trips.
``3epoch`` is for the length of a run alone, and becomes tokens when a config is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_PATTERN = re.compile(
    r"^\s*(\d{1,40}(?:\.\d{1,40})?(?:[eE][+-]?\d{1,2})?|\d{1,40}/\d{1,40})"
    r"\s*([KMBGT]?)\s*(step|tok|dur|epoch)s?\s*$",
    re.ASCII,
)
HELP = "write a duration such as 100step, 300Mtok or 0.8dur"


@dataclass(frozen=True)
class Duration:
    """An amount with a unit.

    value: exact rational amount, already multiplied by the suffix. unit: ``step`` (optimizer
    updates), ``tok`` (tokens trained on), ``dur`` (fraction of the whole run) or ``epoch``.
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
        if "/" in number and int(number.partition("/")[2]) == 0:
            raise ValueError(f"{text!r} divides by zero: {HELP}")
        value = Fraction(number) * _SCALE[suffix]
        if unit in ("dur", "epoch") and suffix:
            what = "a fraction of the run takes" if unit == "dur" else "epochs take"
            raise ValueError(f"{text!r}: {what} no suffix {suffix!r}")
        if unit == "dur" and value > 1:
            raise ValueError(f"{text!r} is longer than the run: 1dur is the whole run")
        if unit in ("step", "tok") and value.denominator != 1:
            name = {"step": "steps", "tok": "tokens"}[unit]
            raise ValueError(f"{text!r}: {name} are whole numbers")
        return cls(value, unit)

    def __str__(self) -> str:
        amount, suffix = self.value, ""
        if self.unit == "tok":
            for letter in ("T", "B", "M", "K"):
                scaled = amount / _SCALE[letter]
                if scaled >= 1 and (scaled * 1000).denominator == 1:
                    amount, suffix = scaled, letter
                    break
        return f"{_exact(amount)}{suffix}{self.unit}"

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


def _exact(amount: Fraction) -> str:
    """Decimal text equal to ``amount``, or ``a/b`` where the decimal would not end."""
    if amount.denominator == 1:
        return str(amount.numerator)
    twos = fives = 0
    rest = amount.denominator
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    digits = max(twos, fives)
    if rest != 1 or digits > 20:
        return f"{amount.numerator}/{amount.denominator}"
    whole, part = divmod(int(amount * 10**digits), 10**digits)
    return f"{whole}.{part:0{digits}d}"
