"""What the contenders of ``finetune.py`` share; nothing but the standard library."""

from __future__ import annotations

import json
import os
from pathlib import Path

from stopwatch import Stopwatch

RANK = 16
LR, BETAS, CLIP = 2e-4, (0.9, 0.95), 1.0
# Rows of equal length.
SEQ_LEN, BATCH = 256, 4
# Conversations: windows that llmtrain packs them into, and conversations to a batch of the peer,
# which make about as many tokens a step on both sides.
WINDOW, WINDOWS, TALKS = 512, 4, 10


class FinetuneJob(Stopwatch):
    """One contender's run, as the environment describes it.

    PEER_DATA: rows (raw uint16 tokens) or talks (JSON, see ``finetune.py``). PEER_TOKENS: the file.
    PEER_STEPS: optimizer steps; of talks as many as they make. PEER_OUT: result file. PEER_MODEL:
    folder of the model in Hugging Face's format. PEER_METHOD: lora or full. PEER_GROUPS: whether
    the peer puts talks of a length together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.model = (Path(os.environ[f"PEER_{x}"]) for x in ("TOKENS", "MODEL"))
        self.steps, self.method = int(os.environ["PEER_STEPS"]), os.environ["PEER_METHOD"]
        self.talks = os.environ["PEER_DATA"] == "talks"
        self.groups = os.environ["PEER_GROUPS"] == "yes"
        self.useful: list[int] = []

    def finish(self, trained: int) -> None:
        """Write what was measured. trained: parameters that were updated."""
        found = {
            "begun": self.begun,
            "stamps": self.stamps,
            "cpu": self.cpu,
            "losses": self.losses,
            "useful": self.useful,
            "trained": trained,
        }
        Path(os.environ["PEER_OUT"]).write_text(json.dumps(found))
