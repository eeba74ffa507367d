"""Checkpoints that a config names beside the run's own: whether they fit, before anything begins.

``init.path``, ``average.anchor``, ``penalty.anchor`` and ``penalty.fisher`` are looked at by one
function. What does not fit is said before the run's folder is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from llmtrain.checkpoint import MODEL_PREFIX, OPTIM_PREFIX, checkpoints_folder, read_files, scan
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.finding import find, foreign
from llmtrain.checkpoint.layout import TENSORS, TensorLayout, read_layout
from llmtrain.checkpoint.tensors import DTYPES, read_tensor
from llmtrain.config.adapters import AdapterConfig
from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.data.plan import DataPlan
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.model import ADAPTER, Decoder, unlike, unpacked

_TOKENIZER = "tokenizer.json"
_NO_TENSOR = "\0"  # no name begins so
# Settings by which equal places in two models mean the same; other shapes follow from some.
_STRUCTURE = (
    "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_ff", "activation", "norm",
    "norm_eps", "norm_placement", "position", "rope_theta", "rope_scaling", "rope_fraction",
    "parallel_residual", "qk_norm", "tie_embeddings",
)  # fmt: skip
_SCALING = ("parametrization", "residual", "attention")
# A run that begins with weights may stretch them to longer sequences on purpose.
_STRETCHED = ("rope_theta", "rope_scaling")


@dataclass(frozen=True)
class Needed:
    """What a run reads of a checkpoint. key: where the config names ``path``.

    prefix: of the names of stored tensors, before the parameter's. learnt: only of parameters that
    training changes. begins: the run begins with these weights, so adapters of its own may be
    missing there. optimizer: its moments as well.
    """

    key: str
    path: str
    prefix: str = MODEL_PREFIX
    learnt: bool = False
    begins: bool = False
    optimizer: bool = False


@dataclass(frozen=True)
class Setting:
    """The run that a checkpoint must fit; model: resolved.

    values: read and verify stored weights too; without them only the small files are looked at.
    """

    ranks: Ranks
    cfg: RunConfig
    model: ModelConfig
    plan: DataPlan
    values: bool = True


@dataclass(frozen=True)
class Fitting:
    """A checkpoint that fits; warnings: what was passed over, and what differs on purpose."""

    path: Path
    warnings: list[str]


def fitting(setting: Setting, needed: Needed) -> Fitting:
    """The checkpoint that ``needed`` names, verified; collective, and writes nothing.

    Its tensors are there in the run's shapes and dtypes and hold finite numbers, its tokenizer is
    that of the data, and its model was built alike. Raises ConfigError naming the key.
    """
    ranks = setting.ranks
    # Moments lie beside the weights: with them all files are verified.
    prefix = "" if needed.optimizer else needed.prefix
    if not setting.values:
        prefix = _NO_TENSOR
    try:
        place = Path(needed.path).expanduser()
        ranks.on_main(lambda: _check_kind(place))
        path, skipped = find(ranks, place, prefix)
        notes = ranks.on_main(lambda: _compare(setting, needed, path))
        if setting.values:
            _check_finite(ranks, path, needed)
    except CheckpointError as error:
        raise ConfigError(f"{needed.key}: {error}") from error
    over = [f"{fault}; passed over, {path} is read in its place" for fault in skipped]
    return Fitting(path, [f"{needed.key}: {text}" for text in (*over, *notes)])


def _check_kind(place: Path) -> None:
    """CheckpointError with the remedy for what is no run and no checkpoint."""
    if not place.exists():
        raise CheckpointError(f"{place} does not exist; give a checkpoint or a run's folder")
    if not place.is_dir() or (place / TENSORS).exists() or scan(checkpoints_folder(place)):
        return
    remedy = foreign(place) or "; give a checkpoint, or a run that has one"
    raise CheckpointError(f"{place} holds no checkpoint that can be used{remedy}")


def _compare(setting: Setting, needed: Needed, path: Path) -> list[str]:
    """Raise CheckpointError for the first thing that does not fit; returns what is to be said."""
    files, stored = read_files(path), read_layout(path)
    _check_tokenizer(path, files, setting.plan)
    config = yaml.safe_load(files.get("config.yaml", b"")) or {}
    notes = _check_structure(path, config.get("model") or {}, setting.model, needed)
    check_adapters_alike(path, config.get("model") or {}, setting.model)
    params = _parameters(setting.model)
    if needed.optimizer:
        _check_optimizer(path, config.get("optim") or {}, stored, setting.cfg)
        if not setting.cfg.trainable:
            _check_moments(path, stored, params)
    _check_tensors(path, stored, params, needed)
    return notes


def _check_tokenizer(path: Path, files: Mapping[str, bytes], plan: DataPlan) -> None:
    theirs = files.get(_TOKENIZER)
    ours = plan.catalogue.tokenizer_files().get(_TOKENIZER)
    if theirs is not None and ours is not None and theirs != ours:
        raise CheckpointError(
            f"{path} was trained with another tokenizer than the data's; prepare the data "
            "with its tokenizer.json (prepare.tokenizer.kind: file)"
        )


def _check_structure(
    path: Path, stored: dict[str, Any], model: ModelConfig, needed: Needed
) -> list[str]:
    notes = []
    for key, (theirs, ours) in _settings(stored, model).items():
        if theirs == ours:
            continue
        differ = f"{path} was trained with model.{key} {_shown(theirs)} and this run has "
        differ += _shown(ours)
        if needed.begins and key in _STRETCHED:
            notes.append(f"{differ}; right only where that is meant")
        else:
            raise CheckpointError(
                f"{differ}, so equal places in them do not mean the same; set "
                f"model.{key}={_shown(theirs)}, or give a checkpoint of such a model"
            )
    return notes


def check_adapters_alike(path: Path, stored: Mapping[str, Any], model: ModelConfig) -> None:
    """Raise CheckpointError where the adapters of a checkpoint would mean another thing in a run.

    stored: section ``model`` of the checkpoint's config.
    """
    section = stored.get("adapters")
    if not section or model.adapters is None:
        return
    known = {field.name for field in fields(AdapterConfig)}
    theirs = AdapterConfig(**{key: value for key, value in section.items() if key in known})
    if (found := unlike(theirs, model)) is not None:
        raise CheckpointError(
            f"{path}: {found}; set model.adapters (kind, rank, alpha, targets and patterns) as in "
            "its config.yaml"
        )


def _settings(stored: dict[str, Any], model: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """The structural settings: theirs and ours. What an older config does not say is left out."""
    theirs = {key: stored[key] for key in _STRUCTURE if key in stored}
    if theirs.get("n_heads"):
        theirs["n_kv_heads"] = theirs.get("n_kv_heads") or theirs["n_heads"]
        if theirs.get("d_model") and theirs.get("d_head") is None:
            theirs["d_head"] = theirs["d_model"] // theirs["n_heads"]
    if theirs.get("d_ff", 0) is None:
        # Follows from d_model and activation; the shapes tell.
        del theirs["d_ff"]
    found = {key: (value, _plain(getattr(model, key))) for key, value in theirs.items()}
    scaling = stored.get("scaling") or {}
    for key in _SCALING:
        if scaling.get(key) is not None:
            found[f"scaling.{key}"] = (scaling[key], getattr(model.scaling, key))
    factors = stored.get("factorized")
    if factors and model.factorized is not None:
        # The shapes tell the rest.
        found["factorized.activation"] = (factors["activation"], model.factorized.activation)
    return found


def _plain(value: Any) -> Any:
    """A setting as it stands in a config.yaml."""
    return vars(value) if hasattr(value, "__dataclass_fields__") else value


def _shown(value: Any) -> str:
    """A setting as it is written on the command line."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=1000)).split("\n...")[0].strip()


def _check_optimizer(
    path: Path, theirs: dict[str, Any], stored: Mapping[str, TensorLayout], cfg: RunConfig
) -> None:
    if not any(key.startswith(OPTIM_PREFIX) for key in stored):
        raise CheckpointError(
            f"{path} holds no optimizer state (a merged or converted model has none); set "
            "init.optimizer=false"
        )
    name = theirs.get("name", cfg.optim.name)
    if name != cfg.optim.name:
        raise CheckpointError(
            f"{path} holds the moments of {name} and optim.name is {cfg.optim.name}; set "
            f"init.optimizer=false or optim.name={name}"
        )


def _check_moments(
    path: Path, stored: Mapping[str, TensorLayout], params: Mapping[str, nn.Parameter]
) -> None:
    """Moments of what trains, and of nothing else."""
    theirs = {key[len(OPTIM_PREFIX) :].rpartition(".")[0] for key in stored if _is_moment(key)}
    ours = {name for name, param in params.items() if param.requires_grad}
    if theirs != ours:
        what = min(theirs ^ ours)
        differ = "holds moments of" if what in theirs else "has no moments of"
        here = "is frozen" if what in theirs else "trains"
        raise CheckpointError(
            f"{path} {differ} {what}, which {here} in this run ({len(theirs ^ ours)} such); set "
            "init.optimizer=false"
        )


def _is_moment(key: str) -> bool:
    return key.startswith(OPTIM_PREFIX)


def _parameters(model: ModelConfig) -> dict[str, nn.Parameter]:
    """The whole model's parameters without memory: names and shapes are those of any layout."""
    with torch.device("meta"):
        return dict(Decoder(unpacked(model), torch.float32).named_parameters())


def _check_tensors(
    path: Path, stored: Mapping[str, TensorLayout], params: Mapping[str, Tensor], needed: Needed
) -> None:
    """Names, shapes and dtypes; one tensor is named, and how many there are."""
    remedy = "give a checkpoint of the same model, or set the model section of its config.yaml"
    # All adapters or none: some alone would compute another function.
    adapted = any(ADAPTER in key for key in stored)
    wanted = {
        needed.prefix + name: param
        for name, param in params.items()
        if (param.requires_grad or not needed.learnt)
        and not (needed.begins and ADAPTER in name and not adapted)
    }
    missing = [key for key in wanted if key not in stored]
    if missing and needed.prefix != MODEL_PREFIX and len(missing) == len(wanted):
        raise CheckpointError(
            f"{path} holds no Fisher information; give a checkpoint of a run with "
            f"penalty.kind=ewc, or set {needed.key}=null"
        )
    if missing:
        raise CheckpointError(f"{path} lacks {_one(missing)} of this run's model; {remedy}")
    for key, param in wanted.items():
        if stored[key].shape != tuple(param.shape):
            shapes = f"{list(stored[key].shape)} and this run needs {list(param.shape)}"
            raise CheckpointError(f"{path} holds {key} in the shape {shapes}; {remedy}")
        if DTYPES[stored[key].dtype] != param.dtype:
            raise CheckpointError(
                f"{path} holds {key} as {DTYPES[stored[key].dtype]} and this run needs "
                f"{param.dtype}; convert or merge it again with dtype fp32"
            )
    if needed.prefix == MODEL_PREFIX:
        more = [
            k for k in stored if k.startswith(MODEL_PREFIX) and k[len("model.") :] not in params
        ]
        if more:
            raise CheckpointError(f"{path} holds {_one(more)}, not in this run's model; {remedy}")


def _one(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")


def _check_finite(ranks: Ranks, path: Path, needed: Needed) -> None:
    """Raise CheckpointError naming a tensor with NaN or infinite values; ranks share the reading.

    The files have just been verified, so this reads from the system's memory where it is large.
    """
    prefixes = (needed.prefix, OPTIM_PREFIX) if needed.optimizer else (needed.prefix,)

    def bad() -> str | None:
        stored = read_layout(path)
        keys = sorted(key for key in stored if key.startswith(prefixes))
        for key in keys[ranks.rank :: ranks.size]:
            if not bool(read_tensor(path, key, stored[key]).isfinite().all()):
                return f"{key} in {path / stored[key].chunks[0].file}"
        return None

    found = ranks.reduce(bad, lambda each: next((text for text in each if text), None))
    if found is not None:
        raise CheckpointError(
            f"{found} holds values that are not finite: that model has diverged; give an earlier "
            "checkpoint or another model"
        )
