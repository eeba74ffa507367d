"""Lottery tickets: iterative magnitude pruning with rewinding.

Frankle et al. 2020 (1912.05671); Paul et al. 2022 (2206.01278, 2210.03044). Level 0 is a dense run.
Level k + 1 goes back to the weights that level 0 had at ``rewind`` and trains from there again, the
same learning rates on the same data, with the mask that is left when the ``prune`` smallest
magnitudes among level k's final kept weights are gone: one threshold over all hidden layers. It
keeps (1 - prune)^(k + 1) of their weights. The optimizer's moments go back with the weights.

Levels whose loss is as low as the dense run's are matching. 2210.03044 finds them linearly
connected: the loss on the line between the solutions of levels k and k + 1 has no barrier.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.checkpoint import MODEL_PREFIX, checkpoints_folder, scan
from llmtrain.checkpoint.layout import read_layout
from llmtrain.checkpoint.store import explain
from llmtrain.checkpoint.tensors import read_tensor
from llmtrain.config import RunConfig, load_config, to_yaml
from llmtrain.config.diff import diff_configs
from llmtrain.config.sparsity import LotteryConfig
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.linear import Mask
from llmtrain.merge.path import MEAN, interpolate
from llmtrain.model import is_hidden_layer
from llmtrain.parallel import World, close_world, init_world
from llmtrain.report.read import read_run
from llmtrain.report.summary import domain_results
from llmtrain.sparsity import largest
from llmtrain.sparsity.storage import load_masks, write_masks
from llmtrain.train.branch import find_point, plan_branch, start
from llmtrain.train.console import table
from llmtrain.train.run import run_folder, train

Say = Callable[[str], None]
RESULT = "lottery.json"


@dataclass(frozen=True)
class Level:
    """A level's outcome. density: kept share of the hidden layers' weights; losses: held-out, by
    domain; barrier: of the mean loss on the line to the level before, in nats per token."""

    level: int
    density: float
    losses: dict[str, float]
    barrier: float | None = None

    @property
    def mean(self) -> float:
        """Mean loss over domains."""
        return sum(self.losses.values()) / len(self.losses)


def run_lottery(cfg: RunConfig, say: Say, world: World | None = None) -> list[Level]:
    """Train what is not done yet of a config with a section ``lottery``; one process.

    Levels are runs ``level-00``, ``level-01`` ... in the folder ``out/name``, their masks files
    beside them. Broken off, it goes on. Raises LlmtrainError.
    """
    section = check(cfg)
    joined = init_world(cfg.device) if world is None else world
    try:
        if joined.size > 1:
            raise ConfigError("lottery: runs on one process; start it without torchrun")
        return _run(cfg, section, say, joined)
    finally:
        if world is None:
            close_world()


def check(cfg: RunConfig) -> LotteryConfig:
    """The section; raises ConfigError for what stands in its way."""
    if cfg.lottery is None:
        raise ConfigError("lottery: is missing; add `lottery: {levels: 8}` to the config")
    for key in ("sparsity", "average", "continual", "init"):
        if getattr(cfg, key) is not None:
            raise ConfigError(f"{key}: does not go together with lottery; take it away")
    tokens = cfg.train.global_batch_size * cfg.data.seq_len
    total = cfg.train.duration.steps(tokens)
    if cfg.lottery.rewind.steps(tokens, total) >= total:
        raise ConfigError(
            f"lottery.rewind: {cfg.lottery.rewind} is not inside the run; make it earlier"
        )
    if cfg.lottery.points in (1, 2):
        raise ConfigError(
            f"lottery.points: {cfg.lottery.points} is too few; use 3 or more, ends included, or 0 "
            "to measure none"
        )
    return cfg.lottery


def _run(cfg: RunConfig, section: LotteryConfig, say: Say, world: World) -> list[Level]:
    folder = run_folder(cfg)
    _claim(cfg, folder)
    known = _known(folder)
    found: list[Level] = []
    for level in range(section.levels + 1):
        run = _folder(cfg, level)
        density = (1 - section.prune) ** level
        if level < len(known) and _done(run):
            found.append(known[level])
            continue
        if not _done(run):
            say(f"level {level} of {section.levels}: density {density:.4g}")
            _train(cfg, section, level, world)
        barrier = None
        if level and section.points:
            curve = interpolate(_folder(cfg, level - 1), run, section.points, device=cfg.device)
            barrier = curve.barriers[MEAN]
        losses = {d.name: d.loss for d in domain_results(read_run(run))}
        found.append(Level(level, _density(folder, level), losses, barrier))
        _write(folder / RESULT, json.dumps([asdict(one) for one in found], indent=1) + "\n")
    for line in lines(found):
        say(line)
    return found


def _known(folder: Path) -> list[Level]:
    """The levels that were measured before; none of a damaged file, they are measured again."""
    try:
        rows = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return [Level(**row) for row in rows]
    except (OSError, ValueError, TypeError):
        return []


def _write(file: Path, text: str) -> None:
    """A file that is whole or not there, wherever the command is killed."""
    part = file.with_name(f"{file.name}.part")
    with explain(f"{file} cannot be written"):
        part.write_text(text, encoding="utf-8")
        part.replace(file)


def lines(found: list[Level]) -> list[str]:
    """A table of the levels."""
    rows = [("level", "density", *found[0].losses, "mean", "barrier to the level before")]
    for one in found:
        barrier = "" if one.barrier is None else f"{one.barrier:.4f}"
        losses = (f"{x:.4f}" for x in one.losses.values())
        rows.append((str(one.level), f"{one.density:.4g}", *losses, f"{one.mean:.4f}", barrier))
    return table(rows)


def _claim(cfg: RunConfig, folder: Path) -> None:
    """Make the folder these levels' own. Raises ConfigError where it is of other settings."""
    config = folder / "config.yaml"
    with explain(f"{folder} cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
        others = {path.name for path in folder.iterdir()} - {config.name, f"{config.name}.part"}
    what = []
    if config.exists():
        what = diff_configs(load_config(config), cfg)
        # More levels go on where fewer have ended.
        what = [text for text in what if not text.startswith("lottery.levels:")]
    if others and not (config.exists() and (folder / "level-00").is_dir()):
        what.append("no lottery")
    if what:
        raise ConfigError(f"{folder} is there already ({what[0]}); choose another name")
    _write(config, to_yaml(cfg))


def _folder(cfg: RunConfig, level: int) -> Path:
    return run_folder(cfg) / f"level-{level:02d}"


def _done(run: Path) -> bool:
    """Whether a level's run has ended."""
    if not (run / "metrics.jsonl").exists():
        return False
    cfg, evals = load_config(run / "config.yaml"), read_run(run).evals
    tokens = cfg.train.global_batch_size * cfg.data.seq_len
    return bool(evals) and evals[-1]["step"] >= cfg.train.duration.steps(tokens)


def _train(cfg: RunConfig, section: LotteryConfig, level: int, world: World) -> None:
    name = f"{cfg.name}/level-{level:02d}"
    if level == 0:
        points = cfg.checkpoint.keep_at
        if section.rewind not in points:
            points = [*points, section.rewind]
        keep = dataclasses.replace(cfg.checkpoint, keep_at=points)
        train(dataclasses.replace(cfg, name=name, lottery=None, checkpoint=keep), world)
        return
    file = _masks_file(run_folder(cfg), level)
    if not file.exists():
        masks = prune(_folder(cfg, level - 1), _before(run_folder(cfg), level), section, level)
        write_masks(file, masks)
    masks = load_masks(file)
    rules = [{"layers": [n], "density": m.density} for n, m in masks.items()]
    sparsity = json.dumps({"density": 1.0, "masks": str(file), "rules": rules})
    point = find_point(_folder(cfg, 0), section.rewind)
    branch, _ = plan_branch(point, None, [f"name={name}", f"sparsity={sparsity}"])
    start(branch, world)


def _masks_file(folder: Path, level: int) -> Path:
    return folder / f"masks-{level:02d}.safetensors"


def _before(folder: Path, level: int) -> Mapping[str, Mask]:
    """The masks of the level before ``level``; none for level 0."""
    return load_masks(_masks_file(folder, level - 1)) if level > 1 else {}


def _density(folder: Path, level: int) -> float:
    if level == 0:
        return 1.0
    masks = load_masks(_masks_file(folder, level)).values()
    kept = sum(int(mask.kept.sum()) for mask in masks)
    return kept / sum(mask.kept.numel() for mask in masks)


def prune(
    run: Path, before: Mapping[str, Mask], section: LotteryConfig, level: int
) -> dict[str, Mask]:
    """The masks of ``level``: of the weights that ``run``, the level before, ended with.

    The round((1 - prune)^level) of all weights with the largest magnitudes among the kept, over
    all hidden layers at once. Raises CheckpointError.
    """
    good = [c for c in scan(checkpoints_folder(run)) if c.problem is None]
    if not good:
        raise CheckpointError(f"{run} holds no checkpoint that can be used; delete it to train it")
    path, layout = good[-1].path, read_layout(good[-1].path)
    scores: dict[str, Tensor] = {}
    for key, entry in layout.items():
        name = key.removeprefix(MODEL_PREFIX).removesuffix(".weight")
        if key == f"{MODEL_PREFIX}{name}.weight" and is_hidden_layer(name):
            weight = read_tensor(path, key, entry).float().abs()
            scores[name] = weight
            if name in before:
                scores[name] = weight.masked_fill(~before[name].kept, -1.0)
    flat = torch.cat([score.flatten() for score in scores.values()])
    count = round((1 - section.prune) ** level * flat.numel())
    kept = torch.split(largest(flat, count), [score.numel() for score in scores.values()])
    return {
        name: Mask(own.view_as(score).clone(), (1, 1), (score.shape[0], score.shape[1]))
        for (name, score), own in zip(scores.items(), kept, strict=True)
    }
