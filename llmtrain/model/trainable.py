"""Which parameters of a model train at which step: parts, last blocks, seeded halves.

BitFit (Ben Zaken et al. 2021, 2106.10199) trains the biases; half finetuning (HFT, Hui et al. 2024,
2404.18466) freezes a random half of every block and draws again in each round. What is drawn are
units: parameters by name, or ``NAME/PART``, the rows of one matrix of a fused parameter. Everything
is a function of the config and the step, so that a resumed run and every rank say the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

import torch
from torch import nn

from llmtrain.config.schema import ROLES, ModelConfig, RunConfig
from llmtrain.config.trainable import TrainableConfig
from llmtrain.errors import ConfigError
from llmtrain.model.adapters import row_parts
from llmtrain.model.decoder import Decoder
from llmtrain.model.init import param_roles
from llmtrain.parallel.pipeline import Part

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_SHOWN = 6


@dataclass(frozen=True)
class _Rule:
    """An entry of ``trainable`` on a model. names: what it selects; steps: of its window."""

    section: TrainableConfig
    names: tuple[str, ...]
    first: int
    last: int
    redraw: int | None

    def round(self, step: int) -> int:
        """Number of the draw at a step of the window."""
        return 0 if self.redraw is None else (step - self.first) // self.redraw

    @property
    def rounds(self) -> int:
        """Number of draws."""
        return 1 if self.redraw is None else -(-(self.last - self.first) // self.redraw)


class Trainable:
    """``cfg.trainable`` on the whole model of a run.

    It chooses among the parameters that train without it: all, or with ``model.adapters`` those
    of the adapters. Raises ConfigError naming the entry that matches nothing, and a step at which
    nothing trains.
    """

    def __init__(self, cfg: RunConfig, model_cfg: ModelConfig) -> None:
        tokens = cfg.train.global_batch_size * cfg.data.seq_len
        self.total = max(cfg.train.duration.steps(tokens), 1)
        self.seed, self.model_cfg = cfg.seed, model_cfg
        with torch.device("meta"):
            model = Decoder(model_cfg)
        roles = param_roles(model)
        self.sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        self.roles = {name: roles[name] for name in self.sizes}
        self.rules: list[_Rule] = []
        for i, section in enumerate(cfg.trainable):
            redraw = None
            if section.half and section.redraw is not None:
                redraw = max(section.redraw.steps(tokens, self.total), 1)
            first, last = (d.steps(tokens, self.total) for d in (section.start, section.until))
            self.rules.append(_Rule(section, self._names(section, i), first, last, redraw))
        # Of the step before, too, which is asked for where something changes.
        self._draws = lru_cache(maxsize=2)(self._all_drawn)
        self._check_gaps()

    def at(self, step: int) -> frozenset[str]:
        """Names of the parameters that update number ``step`` (from 0) changes."""
        return _names_of(self._units(step))

    def frozen_rows(self, step: int) -> dict[str, tuple[bool, ...]]:
        """Of parameters that update number ``step`` changes in part: which rows stay as they are,
        a pattern that repeats over the rows."""
        units = self._units(step)
        found = {}
        for name in _names_of(units) - units:
            rows = row_parts(self.model_cfg, name.rpartition(".")[0])
            frozen = tuple(f"{name}/{part}" not in units for part in rows)
            if any(frozen):
                found[name] = frozen
        return found

    def _units(self, step: int) -> frozenset[str]:
        rounds = (
            rule.round(step) if rule.first <= step < rule.last else None for rule in self.rules
        )
        return self._draws(tuple(rounds))

    def _all_drawn(self, rounds: tuple[int | None, ...]) -> frozenset[str]:
        """The units that train while each rule is in its round; None: outside of its window."""
        found: set[str] = set()
        for i, (rule, number) in enumerate(zip(self.rules, rounds, strict=True)):
            if number is not None:
                found |= self._drawn(i, rule, number)
        return frozenset(found)

    def ever(self) -> frozenset[str]:
        """Names of all that train at some step; the rest has no gradient, and no moments."""
        found: set[str] = set()
        for i, rule in enumerate(self.rules):
            for number in range(rule.rounds if rule.first < rule.last else 0):
                found |= _names_of(self._drawn(i, rule, number))
                if found.issuperset(rule.names):
                    break
        return frozenset(found)

    def freeze(self, model: nn.Module) -> None:
        """Take the gradient from the parameters of a decoder, or of a stage, that never train."""
        names = self.ever()
        for name, param in model.named_parameters():
            param.requires_grad_(name in names)

    def check_stages(self, parts: Iterable[Part]) -> None:
        """Raise ConfigError where nothing of a pipeline stage trains at some step."""
        for number, part in enumerate(parts):
            with torch.device("meta"):
                own = {name for name, _ in Decoder(self.model_cfg, stage=part).named_parameters()}
            for step in self._turns():
                if not own & self.at(step):
                    raise ConfigError(
                        f"trainable: nothing of pipeline stage {number} (blocks "
                        f"{part.blocks.start} to {part.blocks.stop - 1}) trains at step {step}, "
                        "and its backward needs something; lower parallel.pipeline or train more"
                    )

    def lines(self) -> list[tuple[str, ...]]:
        """Rows (parameters, from step, to step, tensors, parameters that train) for printing."""
        rows: list[tuple[str, ...]] = [("trainable", "steps", "tensors", "parameters", "of all")]
        whole = sum(self.sizes.values())
        for i, rule in enumerate(self.rules):
            drawn = self._drawn(i, rule, 0)
            count = sum(map(self._size, drawn))
            what = ", ".join(rule.section.parameters)
            if rule.section.last_blocks is not None:
                what += f", last {rule.section.last_blocks} blocks"
            if rule.section.half:
                again = "" if rule.redraw is None else f", anew every {rule.redraw} steps"
                what += f", half by {rule.section.half_by}{again}"
            share = f"{100 * count / whole:.2f}%"
            steps = f"{rule.first:,} to {rule.last:,}"
            rows.append((what, steps, str(len(_names_of(drawn))), f"{count:,}", share))
        return rows

    def _turns(self) -> list[int]:
        """Steps at which the windows open or close."""
        ends = {0, *(r.first for r in self.rules), *(r.last for r in self.rules)}
        return sorted(step for step in ends if step < self.total)

    def _check_gaps(self) -> None:
        for step in self._turns():
            if not self.at(step):
                raise ConfigError(
                    f"trainable: nothing trains from step {step} on; let start and until of its "
                    f"entries cover the {self.total} steps of the run"
                )

    def _names(self, section: TrainableConfig, index: int) -> tuple[str, ...]:
        where = f"trainable.{index}"
        chosen = self._matching(section.parameters, f"{where}.parameters")
        out = self._matching(section.exclude, f"{where}.exclude")
        names = [name for name in self.sizes if name in chosen and name not in out]
        if section.last_blocks is not None:
            layers = self.model_cfg.n_layers
            if section.last_blocks > layers:
                raise ConfigError(
                    f"{where}.last_blocks: the model has {layers} blocks, not {section.last_blocks}"
                )
            first = layers - section.last_blocks
            blocks = [(name, _BLOCK.fullmatch(name)) for name in names]
            names = [name for name, at in blocks if at is not None and int(at[1]) >= first]
        if not names:
            raise ConfigError(f"{where}: selects no parameter; widen parameters or last_blocks")
        return tuple(names)

    def _matching(self, selectors: list[str], where: str) -> set[str]:
        found: set[str] = set()
        for selector in selectors:
            own = {name for name in self.sizes if self._matches(selector, name)}
            if not own:
                raise ConfigError(f"{where}: {selector!r} matches no parameter; {self._there_is()}")
            found |= own
        return found

    def _matches(self, selector: str, name: str) -> bool:
        if selector == "all":
            return True
        if selector in ROLES:
            return self.roles[name] == selector
        if selector in ("attention", "mlp"):
            return f".{selector}." in name
        return fnmatchcase(name, selector)

    def _there_is(self) -> str:
        """What selectors may name, for error messages."""
        roles = ", ".join(dict.fromkeys(self.roles.values()))
        inside = [n.partition(".")[2].partition(".")[2] for n in self.sizes if _BLOCK.match(n)]
        kinds = list(dict.fromkeys(inside))
        more = ", ..." if len(kinds) > _SHOWN else ""
        outside = [n for n in self.sizes if not _BLOCK.match(n)]
        names = ", ".join([f"blocks.*.{kind}" for kind in kinds[:_SHOWN]]) + more
        also = f", and {', '.join(outside)}" if outside else ""
        return f"there are the roles {roles}, the names {names}{also}"

    def _size(self, unit: str) -> int:
        name, _, part = unit.partition("/")
        if not part:
            return self.sizes[name]
        rows = row_parts(self.model_cfg, name.rpartition(".")[0])
        return self.sizes[name] * rows.count(part) // len(rows)

    def _drawn(self, index: int, rule: _Rule, number: int) -> set[str]:
        """The units of a rule that train in round ``number``."""
        if not rule.section.half:
            return set(rule.names)
        members: dict[tuple[str, str], set[str]] = {}
        found = set()
        for name in rule.names:
            places = self._places(name, rule.section.half_by)
            if not places:
                found.add(name)
            for place, unit in places:
                members.setdefault(place, set()).add(unit)
        groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for block, layer in members:
            category = "norm" if "norm" in layer else layer.partition(".")[0]
            groups.setdefault((block, category), []).append((block, layer))
        draw = f"{self.seed}/trainable.{index}/{number}"
        more = self._larger(groups, draw, rule.section.half_by)
        for (block, category), layers in groups.items():
            label = f"{draw}/{block}.{category}"
            ordered = sorted(layers, key=lambda place: _hash(f"{label}/{place[1]}"))
            # Of an odd number one more or one less than half, and never none.
            count = max((len(ordered) + ((block, category) in more)) // 2, 1)
            for place in ordered[:count]:
                found |= members[place]
        return found

    def _places(self, name: str, half_by: str) -> list[tuple[tuple[str, str], str]]:
        """((block, layer), unit) of what is drawn of a parameter: ("3", "mlp.down") or, by matrix,
        ("3", "attention.q"); nothing for one outside of blocks."""
        found = _BLOCK.fullmatch(name)
        if found is None:
            return []
        words = found[2].split(".")
        layer = words[0] if "norm" in words[0] else ".".join(words[:2])
        rows = row_parts(self.model_cfg, name.rpartition(".")[0]) if half_by == "matrix" else []
        if not rows:
            return [((found[1], layer), name)]
        room = layer.partition(".")[0]
        return [((found[1], f"{room}.{part}"), f"{name}/{part}") for part in dict.fromkeys(rows)]

    def _larger(
        self, groups: dict[tuple[str, str], list[tuple[str, str]]], draw: str, half_by: str
    ) -> set[tuple[str, str]]:
        """(block, category) of which the larger half trains where the number is odd. By layer each
        block draws; by matrix it is every other block of a drawn order, so that over the
        blocks just half trains, as in the paper."""
        labels = {at: _hash(f"{draw}/{at[0]}.{at[1]}") for at in groups}
        if half_by == "layer":
            return {at for at, label in labels.items() if label % 2}
        found: set[tuple[str, str]] = set()
        for category in {category for _, category in groups}:
            odd = [at for at, own in groups.items() if at[1] == category and len(own) % 2]
            odd.sort(key=lambda at: labels[at])
            first = _hash(f"{draw}/{category}") % 2
            found |= set(odd[first::2])
        return found


def _names_of(units: Iterable[str]) -> frozenset[str]:
    """Names of the parameters of units."""
    return frozenset(unit.partition("/")[0] for unit in units)


def _hash(label: str) -> int:
    return int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "little")


def limit_training(model: nn.Module, model_cfg: ModelConfig, cfg: RunConfig) -> None:
    """Freeze what never trains by ``cfg.trainable``; nothing without that section."""
    if cfg.trainable:
        Trainable(cfg, model_cfg).freeze(model)
