"""The guard: what happens when the loss or the gradient norm is not finite or jumps.

A value is a spike when it lies more than ``sigma`` standard deviations above the mean of the
last ``window`` accepted steps. All three levels exist: count it, skip the update, stop the run.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from llmtrain.config.upkeep import GuardConfig
from llmtrain.errors import GuardStop

_MIN_HISTORY = 8


@dataclass(frozen=True)
class Verdict:
    """The guard's word on a step: whether to skip the update, and what to report (or None)."""

    skip: bool
    event: str | None


class Guard:
    """Judges each step from global values, so that all ranks come to the same verdict."""

    def __init__(self, cfg: GuardConfig) -> None:
        self.cfg = cfg
        self.spikes = 0
        self.skipped = 0
        self._in_row = 0
        self._losses: deque[float] = deque(maxlen=cfg.window)
        self._norms: deque[float] = deque(maxlen=cfg.window)

    def suspects(self, loss: float, norm: float) -> bool:
        """Whether ``judge`` would find fault with a step of these global values."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        return not finite or (self.cfg.spike != "ignore" and self._spike(loss, norm) is not None)

    def judge(self, step: int, loss: float, norm: float, samples: str) -> Verdict:
        """Accept, skip or stop.

        step: number of the update. loss, norm: global. samples: the step's global sample ids,
        for the report. Raises GuardStop (exit code 3) when the config says stop or when
        ``max_skips`` updates in a row were skipped.
        """
        fault: str | None
        if not (math.isfinite(loss) and math.isfinite(norm)):
            fault, action = f"loss {loss:g}, gradient norm {norm:g}: not finite", self.cfg.nonfinite
        else:
            fault, action = self._spike(loss, norm), self.cfg.spike
        if fault is None or action == "ignore":
            self._accept(loss, norm)
            return Verdict(False, None)
        self.spikes += 1
        event = f"{fault} ({samples})"
        if action == "count":
            self._accept(loss, norm)
            return Verdict(False, event)
        if action == "stop":
            raise GuardStop(
                f"stopped at step {step}: {event}; nothing was updated. Look at these samples, "
                "then resume from the last checkpoint with a lower optim.lr or guard.*: skip"
            )
        self.skipped += 1
        self._in_row += 1
        if self._in_row >= self.cfg.max_skips:
            raise GuardStop(
                f"stopped at step {step}: {self._in_row} updates in a row were skipped, the last "
                f"for {event}; resume from an earlier checkpoint with a lower optim.lr"
            )
        return Verdict(True, event + "; update skipped")

    def state_dict(self) -> dict[str, Any]:
        """Window and counters as JSON values."""
        return {
            "spikes": self.spikes,
            "skipped": self.skipped,
            "in_row": self._in_row,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.spikes, self.skipped = int(state["spikes"]), int(state["skipped"])
        self._in_row = int(state["in_row"])
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])

    def _accept(self, loss: float, norm: float) -> None:
        self._in_row = 0
        self._losses.append(loss)
        self._norms.append(norm)

    def _spike(self, loss: float, norm: float) -> str | None:
        for name, value, history in (
            ("loss", loss, self._losses),
            ("gradient norm", norm, self._norms),
        ):
            if len(history) < max(_MIN_HISTORY, self.cfg.window // 4):
                continue
            mean = math.fsum(history) / len(history)
            spread = math.sqrt(math.fsum((h - mean) ** 2 for h in history) / len(history))
            if spread > 0 and value > mean + self.cfg.sigma * spread:
                score = (value - mean) / spread
                return f"{name} {value:.4g} is {score:.1f} sigma above the window's {mean:.4g}"
        return None
