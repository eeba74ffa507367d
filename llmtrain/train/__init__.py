"""Training: the loop, the train module, hooks, guard, metrics.

``run.train(cfg)`` assembles a run and drives it; ``trainer.Trainer.step`` is one step from top
to bottom; ``module.TrainModule`` owns model, layout and optimizer; ``hooks.Hook`` is what a
method subclasses.
"""

from llmtrain.train.hooks import Hook

__all__ = ["Hook"]
