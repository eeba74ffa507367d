"""What all contenders of ``cpu_peers.py`` share: the model's shape, the data, the stopwatch.

Needs nothing but the standard library, so that every peer's own environment can import it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from stopwatch import Stopwatch

VOCAB, D_MODEL, N_LAYERS, N_HEADS, D_FF = 8192, 384, 6, 6, 1024
SEQ_LEN, BATCH = 256, 16
NORM_EPS, ROPE_THETA = 1e-5, 10000.0
TOKENS_PER_STEP = BATCH * SEQ_LEN
LR, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
# Embedding and untied head; per layer four attention matrices, three of the MLP, two norms.
PARAMETERS = (
    2 * VOCAB * D_MODEL + N_LAYERS * (4 * D_MODEL**2 + 3 * D_MODEL * D_FF + 2 * D_MODEL) + D_MODEL
)


class Job(Stopwatch):
    """One contender's run, as the environment describes it, and the stopwatch of its steps.

    PEER_TOKENS: raw uint16 tokens. PEER_STEPS: optimizer steps. PEER_OUT: result file.
    PEER_PRECISION: bf16 (mixed: float32 master weights) or fp32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bf16 = os.environ["PEER_PRECISION"] == "bf16"
        self.tokens = Path(os.environ["PEER_TOKENS"])
        self.steps = int(os.environ["PEER_STEPS"])
        self.out = Path(os.environ["PEER_OUT"])

    def finish(self, parameters: int, losses: list[float], note: str) -> None:
        """Write what was measured. losses: first and last, in nats."""
        if parameters != PARAMETERS:
            raise SystemExit(f"the peer's model has {parameters} parameters, not {PARAMETERS}")
        result = {
            "stamps": self.stamps,
            "cpu": self.cpu,
            "parameters": parameters,
            "losses": losses,
            "note": note,
        }
        self.out.write_text(json.dumps(result))
