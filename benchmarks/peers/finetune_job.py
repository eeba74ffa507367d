"""The stopwatch of a contender of ``finetune.py``; nothing but the standard library."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

SEQ_LEN, BATCH, RANK = 256, 4, 16
TOKENS_PER_STEP = BATCH * SEQ_LEN
LR, BETAS, CLIP = 2e-4, (0.9, 0.95), 1.0


class FinetuneJob:
    """One contender's run, as the environment describes it.

    PEER_TOKENS: raw uint16 tokens. PEER_STEPS: optimizer steps. PEER_OUT: result file. PEER_MODEL:
    folder of the model in Hugging Face's format. PEER_METHOD: lora or full.
    """

    def __init__(self) -> None:
        self.tokens, self.model = (Path(os.environ[f"PEER_{x}"]) for x in ("TOKENS", "MODEL"))
        self.steps, self.method = int(os.environ["PEER_STEPS"]), os.environ["PEER_METHOD"]
        self.stamps: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []

    def stamp(self) -> None:
        """An optimizer step has ended."""
        self.stamps.append(time.time())
        self.cpu.append(time.process_time())

    def finish(self, trained: int) -> None:
        """Write what was measured. trained: parameters that were updated."""
        found = {"stamps": self.stamps, "cpu": self.cpu, "losses": self.losses, "trained": trained}
        Path(os.environ["PEER_OUT"]).write_text(json.dumps(found))
