"""What must fit before a sequence begins: data, models and tokenizers of all its tasks.

Nothing is written. Weights are not read either, only the small files beside them: a run reads and
verifies what it begins with when its turn comes.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch

from llmtrain.checkpoint import MODEL_PREFIX, OPTIM_PREFIX, checkpoints_folder, latest, read_files
from llmtrain.checkpoint.layout import META, describe, parse_step, read_layout
from llmtrain.config import check_world, load_config
from llmtrain.config.continual import EXPERTS, INTERPOLATING
from llmtrain.config.schema import ModelConfig
from llmtrain.data.loader import heldout_sets
from llmtrain.data.plan import DataPlan, build_plan
from llmtrain.errors import CheckpointError, ConfigError, LlmtrainError
from llmtrain.finetune.plan import Sequence, Stage
from llmtrain.model import ADAPTER, Decoder, check_tensor_degree, resolve_model, unpacked

TOKENIZER = "tokenizer.json"
# Keys of a model that a task may change: they neither shape the weights nor give them a meaning.
# Adapters have a rule of their own.
_FREE = {
    "vocab_multiple", "max_seq_len", "rope_scaling", "dropout", "init_std", "init_depth_scale",
    "adapters",
}  # fmt: skip


def check_fit(sequence: Sequence, world: int | None = None) -> None:
    """Every task can be trained and measured on the model of the first one.

    Sources, held-out domains, lengths and repetition caps, the model's shape, the tokenizer, and
    what the sequence begins with. world: processes; None: not known yet. Raises ConfigError naming
    the task's key.
    """
    first = sequence.stages[0]
    _check_folder(first)
    _check_domains(sequence)
    plans: list[DataPlan] = []
    models: list[ModelConfig] = []
    for i, stage in enumerate(sequence.stages):
        try:
            if world is not None and stage.task.trained is None:
                check_world(stage.cfg, world)
            plan = build_plan(stage.cfg, stage.steps * stage.cfg.train.global_batch_size)
            model = resolve_model(stage.cfg, plan.vocab_size)
            check_tensor_degree(model, stage.cfg.parallel.tensor)
        except LlmtrainError as error:
            raise ConfigError(f"continual.tasks.{i} ({stage.task.name}): {error}") from error
        plans.append(plan)
        models.append(model)
        _check_same(sequence, i, models)
        _check_tokenizer(i, plans)
    if first.begins is not None:
        merges = sequence.section.method in (*INTERPOLATING, *EXPERTS)
        _check_begin(first, models[0], plans[0], merges)


def _begin_key(first: Stage) -> str:
    return "init.path" if first.task.trained is None else "continual.tasks.0.trained"


def _check_folder(first: Stage) -> None:
    if first.begins is not None and not Path(first.begins).expanduser().is_dir():
        raise ConfigError(
            f"{_begin_key(first)}: {first.begins} is not a folder; give a checkpoint or a run"
        )


def _check_domains(sequence: Sequence) -> None:
    """After each task every task's domains are measured, on that task's own data."""
    for k, measuring in enumerate(sequence.stages):
        found = {one.name for one in heldout_sets(measuring.cfg)}
        for i, stage in enumerate(sequence.stages):
            missing = [name for name in stage.domains if name not in found]
            if missing:
                has = ", ".join(sorted(found)) or "none"
                after = f" after task {k + 1}, {measuring.task.name}" if k else ""
                raise ConfigError(
                    f"continual.tasks.{i}.domains: there is no held-out {missing[0]!r} to measure "
                    f"{stage.task.name} by{after}; the data has {has}"
                )


def _check_same(sequence: Sequence, index: int, models: list[ModelConfig]) -> None:
    """Task ``index`` trains the model of the first one."""
    if index == 0:
        return
    stage, first = sequence.stages[index], sequence.stages[0]
    two = models[index]
    differs = _difference(models[0], two)
    if differs is not None:
        key, theirs, own = differs
        raise ConfigError(
            f"continual.tasks.{index}.overrides: model.{key} is {own} for task {stage.task.name} "
            f"and {theirs} for {first.task.name}; all tasks train one model, so write it once, "
            "outside the tasks"
        )
    section = sequence.section
    before = models[0 if section.method in EXPERTS else index - 1].adapters
    merges = section.method in (*INTERPOLATING, *EXPERTS)
    if two.adapters != before and (before is not None or merges):
        raise ConfigError(
            f"continual.tasks.{index}.overrides: model.adapters differ from those of the model "
            f"that task {stage.task.name} begins with; give all tasks the same"
        )
    kept = sequence.stages[index - 1].cfg.optim.name
    if section.optimizer == "keep" and stage.cfg.optim.name != kept:
        raise ConfigError(
            f"continual.tasks.{index}.overrides: optim.name {stage.cfg.optim.name} cannot take "
            f"over the moments of {kept}, the task before's; write continual.optimizer: fresh"
        )


def _difference(one: ModelConfig, two: ModelConfig) -> tuple[str, object, object] | None:
    """The first key of resolved models that must not differ and does, with both values."""
    free = _FREE - {"max_seq_len"} if one.position == "learned" else _FREE
    for field in fields(ModelConfig):
        values = getattr(one, field.name), getattr(two, field.name)
        if field.name not in free and values[0] != values[1]:
            return field.name, *values
    return None


def _check_tokenizer(index: int, plans: list[DataPlan]) -> None:
    first, own = (plan.catalogue.tokenizer_files().get(TOKENIZER) for plan in (plans[0], plans[-1]))
    if first is not None and own is not None and first != own:
        raise ConfigError(
            f"continual.tasks.{index}.overrides: its data has another tokenizer than the first "
            "task's; prepare the data with the first one's tokenizer.json "
            "(prepare.tokenizer.kind: file)"
        )


def _check_begin(first: Stage, model: ModelConfig, plan: DataPlan, merges: bool) -> None:
    """The model that the sequence begins with has the tasks' shapes and tokenizer.

    merges: it is merged with those of the tasks, so it needs their adapters too.
    """
    assert first.begins is not None
    key = _begin_key(first)
    try:
        path = _checkpoint(Path(first.begins).expanduser())
        stored = {name: layout.shape for name, layout in read_layout(path).items()}
        theirs = read_files(path).get(TOKENIZER)
    except CheckpointError as error:
        raise ConfigError(f"{key}: {error}") from error
    ours = plan.catalogue.tokenizer_files().get(TOKENIZER)
    if theirs is not None and ours is not None and theirs != ours:
        raise ConfigError(
            f"{key}: {path} was trained with another tokenizer than the data's; prepare the data "
            "with its tokenizer.json (prepare.tokenizer.kind: file)"
        )
    remedy = "give `model` the values of its config.yaml"
    wanted = _shapes(model)
    for name in sorted(wanted.keys() | {n for n in stored if n.startswith(MODEL_PREFIX)}):
        has, needs = stored.get(name), wanted.get(name)
        if has is None and ADAPTER in name and merges:
            raise ConfigError(
                f"{key}: {path} has no adapters, and continual.method merges it with tasks that "
                "have (model.adapters); use sequential, sfa, ema, latest, l2 or ewc, or no adapters"
            )
        if has == needs or (has is None and ADAPTER in name):
            continue
        raise ConfigError(
            f"{key}: {path} does not fit the config's model: {name.removeprefix(MODEL_PREFIX)} is "
            f"{_shape(has)} there and {_shape(needs)} here; {remedy}"
        )
    if (path / "config.yaml").exists():
        differs = _difference(
            resolve_model(load_config(path / "config.yaml"), model.vocab_size), model
        )
        if differs is not None:
            raise ConfigError(
                f"{key}: {path} was trained with model.{differs[0]} {differs[1]} and the config "
                f"says {differs[2]}, so its weights do not mean the same; {remedy}"
            )
    init = first.cfg.init
    if init is not None and init.optimizer and not any(n.startswith(OPTIM_PREFIX) for n in stored):
        raise ConfigError(
            f"init.optimizer: {path} holds no optimizer's moments; set init.optimizer=false"
        )


def _checkpoint(path: Path) -> Path:
    """The checkpoint that a path means, by the cheap checks alone."""
    if parse_step(path.name) is not None or (path / META).exists():
        problem = describe(path).problem
        if problem is not None:
            raise CheckpointError(f"{problem}; give another checkpoint")
        return path
    found = latest(checkpoints_folder(path))
    if found is None:
        hint = "give a checkpoint or a run that has saved one"
        if any(path.glob("*.safetensors")):
            hint = "make one of a Hugging Face folder with `llmtrain convert from-hf`"
        raise CheckpointError(f"{path} holds no checkpoint that can be used; {hint}")
    return found


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and whole shapes of the model's tensors in a checkpoint."""
    with torch.device("meta"):
        decoder = Decoder(unpacked(model), torch.float32)
    return {MODEL_PREFIX + name: tuple(p.shape) for name, p in decoder.named_parameters()}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
