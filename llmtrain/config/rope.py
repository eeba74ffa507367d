"""Rotary frequencies stretched for longer sequences than a model was first trained on."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.fields import key


@dataclass(frozen=True)
class RopeScalingConfig:
    """Scaling of the rotary frequencies: linear (Chen et al. 2023, 2306.15595), or that of
    Llama 3.1 (2407.21783), which leaves the fast ones alone."""

    kind: str = key(
        "llama3",
        "linear: all divided by factor; llama3: the slow ones, the fast ones kept, a ramp between",
        choices=("linear", "llama3"),
    )
    factor: float = key(8.0, "what the frequencies are divided by", ge=1)
    low_freq_factor: float = key(
        1.0, "llama3: below this many turns in the original length a frequency is divided", gt=0
    )
    high_freq_factor: float = key(
        4.0, "llama3: above this many turns in the original length a frequency stays", gt=0
    )
    original_max_position: int = key(8192, "llama3: the original length in tokens", ge=1)
