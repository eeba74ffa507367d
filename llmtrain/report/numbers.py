"""Numbers as people read them, axis ticks, and thinning of long curves."""

from __future__ import annotations

import math

import numpy as np

from llmtrain.report.read import Floats, Series

_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
NOTHING = "–"


def short(value: float, digits: int = 3) -> str:
    """Compact: 1.23M, 4.56, 3e-04; an en dash where there is no number."""
    if not math.isfinite(value):
        return NOTHING
    size = abs(value)
    for scale, suffix in _SUFFIXES:
        if float(f"{size:.{digits}g}") >= scale:
            return f"{_plain(value / scale, digits)}{suffix}"
    if 0 < size < 1e-3:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    return _plain(value, digits)


def fixed(value: float, places: int = 4) -> str:
    """With a fixed number of places; an en dash where there is no number."""
    return f"{value:.{places}f}" if math.isfinite(value) else NOTHING


def percent(value: float, places: int = 2) -> str:
    """A share as percent."""
    return f"{100 * value:.{places}f}%" if math.isfinite(value) else NOTHING


def percent_tick(value: float) -> str:
    """A share as a short percentage, for axes."""
    return f"{100 * value:.3g}%"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the two largest that matter."""
    if not math.isfinite(seconds):
        return NOTHING
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def bytes_text(value: float) -> str:
    """Bytes in binary units."""
    if not math.isfinite(value):
        return NOTHING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def _plain(value: float, digits: int) -> str:
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text else text


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values within [low, high], about ``count`` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], with 2 and 5 between them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = math.log10(high / low) < 2.5
    ticks = [m * 10.0**p for p in powers for m in ((1, 2, 5) if few else (1,))]
    if len(powers) > 8:
        ticks = ticks[:: math.ceil(len(powers) / 8)]
    inside = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
    return inside if len(inside) > 1 else linear_ticks(low, high, 4)


def thin(curve: Series, limit: int = 500) -> Series:
    """At most about ``limit`` points: the lowest and the highest of each bucket, in order.

    Spikes survive, which a mean or every n-th point would lose.
    """
    if len(curve) <= limit:
        return curve
    kept = [0, len(curve) - 1]
    for bucket in np.array_split(np.arange(len(curve)), limit // 2):
        values = curve.y[bucket]
        kept += [int(bucket[values.argmin()]), int(bucket[values.argmax()])]
    order = np.unique(kept)
    return Series(curve.x[order], curve.y[order])


def smooth(curve: Series, points: int = 150) -> Series:
    """Means over ``points`` stretches of a long curve; short curves stay as they are."""
    if len(curve) < 2 * points:
        return curve
    cut = np.linspace(0, len(curve), points + 1).astype(np.int64)
    size = np.diff(cut)
    return Series(
        np.add.reduceat(curve.x, cut[:-1]) / size, np.add.reduceat(curve.y, cut[:-1]) / size
    )


def bounds(values: Floats) -> tuple[float, float]:
    """Lowest and highest value; (0, 1) of nothing."""
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
