"""Hooks: how methods reach the training loop without the loop knowing them by name.

A method subclasses ``Hook`` and overrides the moments it needs. Its config section names it: the
section's field in ``RunConfig`` carries the import path of a callable that makes the hook from the
section. A user's own hook is named in the config
(``hooks: [{use: package.module:Class, args: {...}}]``). Hooks run on every rank, those of sections
first, then the listed ones in order.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llmtrain.config.schema import HookConfig, RunConfig
from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from llmtrain.data.batch import Batch
    from llmtrain.data.plan import DataPlan
    from llmtrain.train.fitting import Needed
    from llmtrain.train.module import StepResult
    from llmtrain.train.trainer import Trainer


class Hook:
    """Does nothing at every moment of a run; override what is needed.

    section: the config section that made the hook, None for one of ``hooks``; set by the loader.
    found: the checkpoints that ``needs`` asked for, by key; set before the run's folder is written.
    """

    section: str | None = None
    found: Mapping[str, Path] = MappingProxyType({})

    def needs(self, cfg: RunConfig, state: dict[str, Any] | None) -> list[Needed]:
        """The checkpoints of other runs that the hook will read; called before anything is written.

        state: what a resumed run will give to ``load_state_dict``, or None. They are looked at
        next and then stand in ``found``. Raises ConfigError for what is wrong by then.
        """
        return []

    def check(self, cfg: RunConfig, plan: DataPlan) -> None:
        """Look at the files that the section names, before the run writes anything.

        Called on every rank, without the others, for hooks of sections. Raises LlmtrainError
        naming the key of a file that is missing, damaged or does not fit.
        """

    def prepare(self, trainer: Trainer) -> None:
        """Once, after a checkpoint (if any) was loaded and before any ``on_run_start``: the moment
        to change the weights that the run begins with."""

    def on_run_start(self, trainer: Trainer) -> None:
        """Once, before the first step."""

    def before_batch(self, trainer: Trainer, batch: Batch) -> None:
        """Before the forward pass; may change ``batch.weights`` [b, s] in place.

        batch: this rank's part of the global batch, on the device. The loss denominator is
        summed over ranks afterwards, so changed weights stay exactly normalised.
        """

    def after_backward(self, trainer: Trainer) -> None:
        """When the gradients are complete and reduced, before norm, clipping and update."""

    def repeatable(self, trainer: Trainer) -> bool:
        """Whether forward and backward of this step, made again now, would give the same result.

        Asked after ``after_backward`` of a suspicious step (``guard.replay``), for all ranks alike.
        """
        return True

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """After the optimizer's update (or the skip of it)."""

    def on_eval(self, trainer: Trainer, metrics: dict[str, dict[str, float]]) -> None:
        """After an evaluation. metrics: domain -> loss, perplexity, bits_per_byte, tokens."""

    def on_checkpoint(self, trainer: Trainer) -> None:
        """Before a checkpoint is taken: the moment to bring ``state_dict`` up to date."""

    def on_run_end(self, trainer: Trainer) -> None:
        """Once, after the last step, before the final checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON values; saved in every checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise CheckpointError when ``load_state_dict`` could not take ``state``.

        Called before a resumed run writes anything, for hooks of sections.
        """

    def tensors(self, trainer: Trainer) -> dict[str, Tensor]:
        """Tensors a resumed run needs besides, by name; saved in every checkpoint.

        DTensors, or plain tensors that are equal on all ranks. On resume this is called after
        ``load_state_dict``, and what it returns is filled in place from the checkpoint, under
        whatever layout that was saved.
        """
        return {}


def check_hooks(hooks: Sequence[Hook], cfg: RunConfig, plan: DataPlan) -> None:
    """Let the hooks of sections look at the files that these name."""
    for hook in hooks:
        if hook.section is not None:
            hook.check(cfg, plan)


def check_states(hooks: Sequence[Hook], states: Mapping[str, dict[str, Any]]) -> None:
    """Let the hooks of sections look at the states that a resumed run will give them."""
    for hook in hooks:
        if hook.section is not None and hook.section in states:
            hook.check_state(states[hook.section])


def load_hooks(cfg: RunConfig) -> list[Hook]:
    """The hooks of the sections that are set, then those listed in ``hooks``.

    Raises ConfigError naming the entry that fails.
    """
    made = []
    for field in dataclasses.fields(cfg):
        section = getattr(cfg, field.name)
        if "hook" in field.metadata and section:
            module, _, name = field.metadata["hook"].partition(":")
            hook: Hook = getattr(importlib.import_module(module), name)(section)
            hook.section = field.name
            made.append(hook)
    return made + [_load(config, f"hooks.{i}") for i, config in enumerate(cfg.hooks)]


def _load(config: HookConfig, where: str) -> Hook:
    module_name, _, class_name = config.use.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{where}.use: cannot import {config.use!r} ({error}); write package.module:Class of "
            "an installed package"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Hook)):
        raise ConfigError(f"{where}.use: {config.use!r} is not a subclass of llmtrain.train.Hook")
    try:
        return found(**config.args)
    except TypeError as error:
        raise ConfigError(f"{where}.args: {config.use} does not take them ({error})") from error
