"""A checkpoint of ours from adapters in PEFT's format and the checkpoint that they adapt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.checkpoint import MODEL_PREFIX
from llmtrain.checkpoint.base import home_of, refer
from llmtrain.checkpoint.layout import (
    BASE,
    CHECKSUMS,
    META,
    TENSORS,
    Chunk,
    TensorLayout,
    checksums_text,
    layout_text,
    read_json,
    read_layout,
)
from llmtrain.checkpoint.safefile import read_header, write_small
from llmtrain.checkpoint.store import new_folder
from llmtrain.config import load_config, to_yaml
from llmtrain.config.adapters import AdapterConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.convert.folder import ModelFolder
from llmtrain.convert.incoming import meta_text
from llmtrain.convert.outgoing import OpenedCheckpoint, open_checkpoint
from llmtrain.convert.peft import CONFIG, MAGNITUDE, PREFIX, WEIGHTS, A, B, Layer, adaptable_layers
from llmtrain.convert.writing import Converted, Target, in_blocks, write_file
from llmtrain.errors import CheckpointError
from llmtrain.model import AdaptedPart, adapted_parts, complete, is_directed

_NOT_CARRIED = {BASE, META, "extra.json", "config.yaml"}
# Ways to begin that leave the base's weights as they are.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
_FILE = "model-00000-of-00001.safetensors"


@dataclass(frozen=True)
class _Folder:
    """An opened adapter. modules: names of tensors by module and suffix."""

    weights: ModelFolder
    modules: dict[str, dict[str, str]]

    @property
    def path(self) -> Path:
        return self.weights.path

    @property
    def config(self) -> dict[str, Any]:
        return self.weights.config

    def read(self, module: str, suffix: str) -> Tensor:
        """A tensor as float32."""
        return self.weights.read(self.modules[module][suffix]).float()


def from_peft(src: Path, dst: Path, *, base: Path) -> Converted:
    """Write the adapters in the folder ``src`` as a checkpoint ``dst`` that refers to ``base``.

    base: a checkpoint of ours or a run, whose newest good one is taken. LoRA, rsLoRA and DoRA with
    ranks and alphas of their own. Raises CheckpointError naming both sides where the adapter is for
    another model, and what is in it that does not exist here; then nothing is written.
    """
    opened = open_checkpoint(Path(base))
    if opened.cfg.adapters is not None:
        raise CheckpointError(
            f"{opened.path} has adapters of its own (model.adapters); give its base, or merge them "
            "with convert to-hf first"
        )
    folder = _open(Path(src).expanduser())
    layers = list(adaptable_layers(opened, opened.cfg))
    _check_names(folder, opened, layers)
    cfg = complete(
        replace(opened.cfg, adapters=_section(folder, layers)), None, opened.cfg.max_seq_len or 1
    )
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        parts = adapted_parts(cfg, layer.name)
        if parts:
            tensors |= _layer_tensors(folder, opened, layer, parts, cfg)
    with new_folder(Path(dst)) as temporary:
        _write(temporary, Path(dst), folder, opened, cfg, tensors)
    n_params = sum(value.numel() for value in tensors.values())
    what = f"adapters for {opened.architecture.name}"
    return Converted(Path(dst), what, n_params, 4 * n_params, opened.notes)


def _open(path: Path) -> _Folder:
    """The adapter's files. Raises CheckpointError for what cannot be had here."""
    if not (path / CONFIG).exists():
        raise CheckpointError(f"{path} has no {CONFIG}; give a folder as peft saves it")
    config = read_json(path / CONFIG)
    if not (path / WEIGHTS).exists():
        raise CheckpointError(
            f"{path} has no {WEIGHTS}; save the adapter with peft's save_pretrained (pickled "
            "weights are not opened here)"
        )
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise CheckpointError(f"{path / CONFIG}: peft_type {kind} is none of LORA, rsLoRA, DoRA")
    unknown = {
        "bias": config.get("bias", "none") != "none",
        "lora_bias": bool(config.get("lora_bias")),
        "modules_to_save": bool(config.get("modules_to_save")),
        "trainable_token_indices": bool(config.get("trainable_token_indices")),
        "target_parameters": bool(config.get("target_parameters")),
        "layer_replication": bool(config.get("layer_replication")),
        "use_qalora": bool(config.get("use_qalora")),
        "init_lora_weights": config.get("init_lora_weights", True) not in _PLAIN_STARTS,
    }
    for key, is_set in unknown.items():
        if is_set:
            raise CheckpointError(
                f"{path / CONFIG}: {key} {config[key]!r} trains or changes more than the matrices "
                "A and B; merge the adapter with peft (merge_and_unload) and use convert from-hf"
            )
    _check_values(path, config)
    entries = {n: (path / WEIGHTS, entry) for n, entry in read_header(path / WEIGHTS).items()}
    modules: dict[str, dict[str, str]] = {}
    for name in entries:
        whole = name + ".weight" if name.endswith(".lora_magnitude_vector") else name
        suffix = next((s for s in (A, B, MAGNITUDE) if whole.endswith(s)), None)
        if suffix is None or not name.startswith(PREFIX):
            raise CheckpointError(
                f"{path / WEIGHTS} holds {name}, which is no A, B or magnitude of a linear layer"
            )
        module = whole.removeprefix(PREFIX).removesuffix(suffix)
        modules.setdefault(module, {})[suffix] = name
    if not modules:
        raise CheckpointError(f"{path / WEIGHTS} holds no adapter")
    return _Folder(ModelFolder(path, config, entries), modules)


def _check_values(path: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a setting that cannot be what peft wrote."""

    def number(value: Any, kinds: type | tuple[type, ...]) -> bool:
        known = isinstance(value, kinds) and not isinstance(value, bool)
        return known and 0 < value < float("inf")

    def named(value: Any) -> bool:
        if isinstance(value, str):
            return value == "all-linear" or _is_pattern(value)
        return value is None or _is_list_of(value, str)

    def pattern(value: Any, kinds: type | tuple[type, ...]) -> bool:
        if not isinstance(value or {}, dict):
            return False
        return all(_is_pattern(key) and number(v, kinds) for key, v in (value or {}).items())

    good = {
        "r": number(config.get("r", 8), int),
        "lora_alpha": number(config.get("lora_alpha", 8), (int, float)),
        "rank_pattern": pattern(config.get("rank_pattern"), int),
        "alpha_pattern": pattern(config.get("alpha_pattern"), (int, float)),
        "target_modules": named(config.get("target_modules")),
        "exclude_modules": named(config.get("exclude_modules")),
        "layers_to_transform": _is_list_of(config.get("layers_to_transform") or 0, int),
        "layers_pattern": all(map(_is_pattern, _listed(config.get("layers_pattern") or []))),
    }
    for key, is_good in good.items():
        if not is_good:
            raise CheckpointError(
                f"{path / CONFIG}: {key} {config.get(key)!r} is not what peft writes there: "
                "positive numbers, names or regular expressions; save the adapter again with "
                "peft's save_pretrained"
            )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_list_of(value: Any, kind: type) -> bool:
    """Whether it is such a value or a list of them."""
    return all(isinstance(v, kind) for v in _listed(value))


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return True


def _check_names(folder: _Folder, opened: OpenedCheckpoint, layers: list[Layer]) -> None:
    """Raise CheckpointError where the adapter's modules are not the base's, or not its config's."""
    known = {module for layer in layers for module in layer.modules}
    foreign = sorted(folder.modules.keys() - known)
    every = {name.removesuffix(".weight") for rule in opened.rules for name in rule.theirs}
    if foreign and foreign[0] in every:
        raise CheckpointError(
            f"{folder.path} adapts {foreign[0]}, which {opened.architecture.name} keeps in one "
            "matrix of its own order, or is none of attention and MLP; merge it with peft "
            "(merge_and_unload) and use convert from-hf"
        )
    if foreign:
        raise CheckpointError(
            f"{folder.path} adapts {foreign[0]} ({len(foreign)} such), and {opened.path}, a "
            f"{opened.architecture.name} of {opened.cfg.n_layers} layers, has "
            f"{min(known, default='none')} and the like; the adapter is for another model"
        )
    wanted = {A, B, MAGNITUDE} if folder.config.get("use_dora") else {A, B}
    for module in sorted(known):
        held, named = set(folder.modules.get(module, {})), _is_target(folder.config, module)
        if held != (wanted if named else set()):
            lacks = sorted(wanted - held) if named else []
            what = f"lacks {module}{lacks[0]}" if lacks else f"holds {module}"
            says = "names it" if named else "does not name it"
            raise CheckpointError(
                f"{folder.path / WEIGHTS} {what}, and {CONFIG} {says} (target_modules, use_dora); "
                "the two files do not belong together"
            )


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    """What peft decides (0.21, ``check_target_module_exists``)."""

    def named(targets: Any) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, module) is not None
        return any(module == t or module.endswith(f".{t}") for t in targets or ())

    targets = config.get("target_modules")
    if named(config.get("exclude_modules")):
        return False
    if targets == "all-linear":
        return True
    if not named(targets) or isinstance(targets, str):
        return named(targets)
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = (re.match(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.", module) for p in patterns)
    match = next((m for m in found if m is not None), None)
    wanted = [layers] if isinstance(layers, int) else layers
    return match is not None and int(match["idx"]) in wanted


def _section(folder: _Folder, layers: list[Layer]) -> AdapterConfig:
    """The adapters as a config's section, in the fewest words."""
    config = folder.config
    rank, alpha = int(config.get("r", 8)), float(config.get("lora_alpha", 8))
    kind = "dora" if config.get("use_dora") else "lora"
    kind = f"rs{kind}" if config.get("use_rslora") else kind
    matrices = {
        (layer.name, part): module for layer in layers for module, part in layer.modules.items()
    }
    adapted = {m: module for m, module in matrices.items() if module in folder.modules}
    ranks = {m: int(_pattern(config, "rank_pattern", name, rank)) for m, name in adapted.items()}
    alphas = {m: float(_pattern(config, "alpha_pattern", n, alpha)) for m, n in adapted.items()}
    every: dict[str, list[tuple[str, str]]] = {}
    for matrix in matrices:
        every.setdefault(matrix[1], []).append(matrix)
    return AdapterConfig(
        kind,
        rank,
        alpha,
        targets=list(_short(dict.fromkeys(adapted, True), every)),
        rank_pattern={k: v for k, v in _short(ranks, every).items() if v != rank},
        alpha_pattern={k: v for k, v in _short(alphas, every).items() if v != alpha},
    )


def _pattern(config: Mapping[str, Any], key: str, module: str, common: Any) -> Any:
    """A module's own rank or alpha, the first whose pattern matches (peft, ``get_pattern_key``)."""
    own = config.get(key) or {}
    return next((v for p, v in own.items() if re.match(rf"(.*\.)?({p})$", module)), common)


def _short(
    values: Mapping[tuple[str, str], Any], every: Mapping[str, list[tuple[str, str]]]
) -> dict[str, Any]:
    """Values by matrix name where they are the same in all layers, else by layer and name."""
    found: dict[str, Any] = {}
    for part, matrices in every.items():
        own = {m: values[m] for m in matrices if m in values}
        if len(own) == len(matrices) and len(set(own.values())) == 1:
            found[part] = next(iter(own.values()))
        else:
            found |= {f"{layer}.{name}": value for (layer, name), value in own.items()}
    return found


def _layer_tensors(
    folder: _Folder,
    opened: OpenedCheckpoint,
    layer: Layer,
    parts: list[AdaptedPart],
    cfg: ModelConfig,
) -> dict[str, Tensor]:
    """A, B and magnitude of a layer of ours, zero where a matrix is not adapted or of less rank."""
    assert cfg.adapters is not None
    shape = read_layout(opened.path)[f"{MODEL_PREFIX}{layer.rule.ours}"].shape
    sizes = [len(t) for t in layer.rule.split(torch.empty(shape[0], device="meta"), cfg)]
    chosen, rank = {part.name: part for part in parts}, max(part.rank for part in parts)
    a: list[Tensor] = []
    b, lengths = [torch.zeros(n, rank) for n in sizes], [torch.zeros(n) for n in sizes]
    for i, (module, name) in enumerate(layer.modules.items()):
        if name not in chosen:
            continue
        own = chosen[name].rank
        wanted = {A: (own, shape[1]), B: (sizes[i], own), MAGNITUDE: (sizes[i],)}
        for suffix, key in folder.modules[module].items():
            shape_there = folder.weights.shape(key)
            if shape_there != wanted[suffix]:
                raise CheckpointError(
                    f"{folder.path}: {module}{suffix} is {list(shape_there)}, and {layer.name} "
                    f"({name}) of {opened.path} with rank {own} takes {list(wanted[suffix])}; the "
                    "adapter is for another model"
                )
        a.append(torch.zeros(rank, shape[1]))
        a[-1][:own] = folder.read(module, A)
        b[i][:, :own] = folder.read(module, B)
        if is_directed(cfg.adapters):
            lengths[i] = folder.read(module, MAGNITUDE)
    named = {"a": torch.cat(a), "b": layer.rule.join(b, cfg)}
    if is_directed(cfg.adapters):
        named["magnitude"] = layer.rule.join(lengths, cfg)
    return {f"{MODEL_PREFIX}{layer.name}.adapter.{k}.weight": t for k, t in named.items()}


def _write(
    temporary: Path,
    dst: Path,
    folder: _Folder,
    opened: OpenedCheckpoint,
    cfg: ModelConfig,
    tensors: dict[str, Tensor],
) -> None:
    """All files of the checkpoint."""
    names = sorted(tensors)
    targets = [Target(n, torch.float32, tuple(tensors[n].shape)) for n in names]
    sums = [write_file(temporary / _FILE, targets, (in_blocks(tensors[n]) for n in names))]
    layout = {
        t.name: TensorLayout("F32", t.shape, (Chunk((0,) * len(t.shape), t.shape, _FILE),))
        for t in targets
    }
    run = load_config(opened.path / "config.yaml")
    run = replace(run, name=dst.name, model=replace(run.model, adapters=cfg.adapters))
    home = home_of(opened.path, (k for k in read_layout(opened.path) if k.startswith(MODEL_PREFIX)))
    if home is None:
        raise CheckpointError(f"{opened.path} holds only a part of its weights; merge it first")
    name = folder.config.get("base_model_name_or_path")
    source = {**opened.origin, "adapter": str(folder.path.resolve()), "adapts": name}
    files = {n: data for n, data in opened.files.items() if n not in _NOT_CARRIED}
    files |= {
        "config.yaml": to_yaml(run).encode(),
        META: meta_text(source).encode(),
        BASE: refer(home).text(dst.absolute().parent).encode(),
        TENSORS: layout_text(layout),
    }
    sums += [write_small(temporary / n, data) for n, data in files.items()]
    write_small(temporary / CHECKSUMS, checksums_text(sums))
