"""Weights of other runs: a new run begins with them, its hooks read them, or they are evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain.checkpoint import HOOK_PREFIX, MODEL_PREFIX, OPTIM_PREFIX, scan
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.layout import read_layout
from llmtrain.checkpoint.loading import load_into
from llmtrain.checkpoint.objects import Objects
from llmtrain.checkpoint.rows import RowReader
from llmtrain.config import RunConfig
from llmtrain.config.continual import InitConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.data.loader import heldout_sets
from llmtrain.data.plan import DataPlan, build_plan
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.model import ADAPTER, fill_packed, packed_weights, resolve_model
from llmtrain.parallel import World, build_layout
from llmtrain.parallel.hardware import resolve_precision
from llmtrain.train.clockwork import Clockwork
from llmtrain.train.engine import build_module
from llmtrain.train.evaluation import Evaluation
from llmtrain.train.fitting import Needed, Setting, fitting
from llmtrain.train.hooks import Hook, check_hooks, load_hooks
from llmtrain.train.module import TrainModule

Metrics = dict[str, dict[str, float]]
Warn = Callable[[str], None]


def begins_anew(cfg: RunConfig, folder: Path, ranks: Ranks) -> bool:
    """Whether there is nothing to resume from, not in the object store either; collective.

    folder: of the run's checkpoints. Raises LlmtrainError when the store cannot be read.
    """
    if cfg.checkpoint.resume != "auto":
        return cfg.checkpoint.resume == "never"

    def nothing() -> bool:
        if scan(folder):
            return False
        place = cfg.checkpoint.remote
        return place is None or not Objects(place, cfg.name).steps()

    return ranks.on_main(nothing)


def find_init(setting: Setting, warn: Warn) -> Path | None:
    """The checkpoint that ``init`` names, None without one; collective, and writes nothing.

    Raises ConfigError naming what does not fit, see ``fitting``.
    """
    init = setting.cfg.init
    if init is None:
        return None
    needed = Needed("init.path", init.path, begins=True, optimizer=init.optimizer)
    return _found(setting, needed, warn)


def find_needed(
    setting: Setting, hooks: Sequence[Hook], states: Mapping[str, Any], warn: Warn
) -> None:
    """Tell each hook the checkpoints that it will read; collective, and writes nothing.

    states: the hooks' states in the checkpoint that the run goes on from, by section. Raises
    ConfigError naming what does not fit.
    """
    for hook in hooks:
        state = states.get(hook.section) if hook.section is not None else None
        needed = hook.needs(setting.cfg, state)
        hook.found = {one.key: _found(setting, one, warn) for one in needed}


def look_ahead(cfg: RunConfig, model_cfg: ModelConfig, plan: DataPlan) -> list[str]:
    """Look at the files and checkpoints that the config names as a run does before it begins.

    All but the values of stored weights; returned is what the run would warn of. Raises
    LlmtrainError.
    """
    warnings: list[str] = []
    setting = Setting(Ranks(None), cfg, model_cfg, plan, values=False)
    hooks = load_hooks(cfg)
    check_hooks(hooks, cfg, plan)
    if begins_anew(cfg, Path(cfg.out) / cfg.name / "checkpoints", setting.ranks):
        find_init(setting, warnings.append)
        find_needed(setting, hooks, {}, warnings.append)
    return warnings


def _found(setting: Setting, needed: Needed, warn: Warn) -> Path:
    fits = fitting(setting, needed)
    for text in fits.warnings:
        warn(text)
    return fits.path


def resume_with(module: TrainModule, path: Path, load: Callable[..., None], ranks: Ranks) -> None:
    """Replace the module's state by a checkpoint's; collective. load: of a ``Checkpointer``.

    With ``trainable`` the checkpoint has the moments of what was training then; those of other
    parameters begin anew.
    """
    unused: Sequence[str] = (HOOK_PREFIX, *apart(module))
    stored: Mapping[str, Any] | None = None
    if module.cfg.trainable:
        unused, stored = (OPTIM_PREFIX, *unused), read_layout(path)
    module.restore(
        lambda tensors: load(
            path,
            {
                key: value
                for key, value in tensors.items()
                if stored is None or key in stored or not key.startswith(OPTIM_PREFIX)
            },
            unused=unused,
            verify=False,
        )
    )
    read_apart(module, path, ranks)


def begin_with(module: TrainModule, path: Path, init: InitConfig, world: World) -> None:
    """Replace the module's weights by those of a checkpoint that was found to fit; collective.

    The optimizer's moments too where asked for. Raises ConfigError when they do not fit.
    """
    ranks = Ranks(world.cpu_group)
    prefixes = (MODEL_PREFIX, OPTIM_PREFIX) if init.optimizer else (MODEL_PREFIX,)
    all_moments = init.optimizer and not module.cfg.trainable
    others = (HOOK_PREFIX,) if all_moments else (OPTIM_PREFIX, HOOK_PREFIX)
    unused = (*others, *apart(module))

    def may_lack(key: str) -> bool:
        moments = bool(module.cfg.trainable) and key.startswith(OPTIM_PREFIX)
        return ADAPTER in key or moments

    try:
        stored = ranks.on_main(lambda: set(read_layout(path)))
        module.restore(
            lambda tensors: load_into(
                ranks,
                path,
                {
                    key: value
                    for key, value in tensors.items()
                    if key.startswith(prefixes) and (key in stored or not may_lack(key))
                },
                unused,
                False,
            )
        )
        read_apart(module, path, ranks)
    except CheckpointError as error:
        raise ConfigError(f"init.path: {error}") from error
    if not any(ADAPTER in key for key in stored):
        # The frozen weights are others than those that these were first taken of.
        module.set_magnitudes()


def apart(module: TrainModule) -> tuple[str, ...]:
    """Names of stored tensors that ``read_apart`` reads, and nobody else."""
    return tuple(MODEL_PREFIX + n for n in (*packed_weights(module.model_cfg), *module.frozen()))


def read_apart(module: TrainModule, path: Path, ranks: Ranks) -> None:
    """Fill frozen weights that are no part of the module's state, packed ones and DeepSpeed's, from
    a verified checkpoint; collective. Each rank reads its own part. Raises CheckpointError.
    """
    if packed_weights(module.model_cfg):
        ranks.reduce(lambda: fill_packed(module.model, RowReader(path)), lambda _: None)
    frozen = {MODEL_PREFIX + name: value for name, value in module.frozen().items()}
    if ranks.reduce(lambda: bool(frozen), any):
        load_into(ranks, path, frozen, ("",), True)
        module.weights_changed()


def evaluate_weights(cfg: RunConfig, path: Path, world: World) -> Metrics:
    """Held-out metrics of a checkpoint's weights under the layout of ``cfg``; collective.

    Domain -> loss, perplexity, bits_per_byte, tokens. Raises LlmtrainError.
    """
    plan = build_plan(cfg, Clockwork.from_config(cfg).total * cfg.train.global_batch_size)
    model_cfg = resolve_model(cfg, plan.vocab_size)
    init = InitConfig(str(path))
    setting = Setting(Ranks(world.cpu_group), cfg, model_cfg, plan)
    found = fitting(setting, Needed("init.path", init.path, begins=True)).path
    assert model_cfg.n_kv_heads is not None
    layout = build_layout(cfg.parallel, world, model_cfg.n_kv_heads)
    module = build_module(cfg, model_cfg, resolve_precision(cfg.precision, world.device), layout)
    begin_with(module, found, init, world)
    return Evaluation(cfg, heldout_sets(cfg, plan.catalogue)).run(module)
