"""Held-out evaluation of a run in training."""

from __future__ import annotations

from collections.abc import Sequence

from llmtrain.config.schema import RunConfig
from llmtrain.data.loader import HeldoutSet
from llmtrain.eval.heldout import evaluate_domains
from llmtrain.parallel import release_gathered
from llmtrain.train.module import TrainModule


class Evaluation:
    """The held-out sets of a run, evaluated on the same sequences every time."""

    def __init__(self, cfg: RunConfig, sets: Sequence[HeldoutSet]) -> None:
        self.cfg, self.sets = cfg, list(sets)

    def run(self, module: TrainModule) -> dict[str, dict[str, float]]:
        """Domain -> loss, perplexity, bits_per_byte (where bytes are known), tokens."""
        train = self.cfg.train
        whole = train.global_batch_size // module.layout.degrees.data
        micro = self.cfg.eval.micro_batch_size or train.micro_batch_size or whole
        module.model.eval()
        try:
            return evaluate_domains(module, self.sets, micro, module.layout)
        finally:
            module.model.train()
            release_gathered(module.model)
