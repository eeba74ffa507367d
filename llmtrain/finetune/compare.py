"""What models learned and forgot against the one they began with, and how their weights changed.

The two axes of LoRA Learns Less and Forgets Less (Biderman et al. 2024, 2405.09673): here the
held-out loss of the domain that was adapted to, and of those that came before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.analysis.spectra import Spectrum, spectra, summary_rows
from llmtrain.analysis.weights import Matrices, open_matrices
from llmtrain.errors import ConfigError
from llmtrain.eval.checkpoint import evaluate_checkpoint
from llmtrain.train.console import table

Say = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """Of a base and of models that came from it. losses: label -> domain -> held-out loss in nats
    per token, empty where nothing was evaluated; changes: label -> spectra of the change."""

    base: str
    losses: dict[str, dict[str, float]]
    changes: dict[str, list[Spectrum]]

    def lines(self) -> list[str]:
        """The tables."""
        out: list[str] = []
        if self.losses:
            out += [f"held-out loss, and its change against {self.base}:", *self._loss_table()]
        for label, found in self.changes.items():
            out += [f"change of weights from {self.base} to {label}:"]
            out += table(summary_rows(found))
        return out

    def _loss_table(self) -> list[str]:
        before = self.losses[self.base]
        rows = [("model", *before)]
        for label, losses in self.losses.items():
            cells = [f"{losses[domain]:.4f}" for domain in before]
            if label != self.base:
                cells = [
                    f"{losses[domain]:.4f} ({losses[domain] - before[domain]:+.4f})"
                    for domain in before
                ]
            rows.append((label, *cells))
        return table(rows)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        spectra_ = {k: [one.record() for one in found] for k, found in self.changes.items()}
        return {"base": self.base, "losses": self.losses, "spectra": spectra_}


@dataclass(frozen=True)
class Request:
    """What ``compare`` looks at. overrides: of the data that all are evaluated on, such as
    data.corpus; evaluates: False leaves losses out. patterns: matrices, [] for no spectra."""

    base: str
    models: Sequence[str]
    overrides: Sequence[str] = ()
    evaluates: bool = True
    patterns: Sequence[str] = ("blocks.*",)
    device: str = "auto"


def compare(request: Request, say: Say) -> Comparison:
    """Compare models with their base. Raises LlmtrainError naming what does not fit."""
    opened = {path: open_matrices(path) for path in (request.base, *request.models)}
    for matrices in opened.values():
        for text in matrices.warnings:
            say(f"warning: {text}")
    losses = _losses(request, opened, say) if request.evaluates else {}
    changes = {}
    if request.patterns:
        base = opened[request.base]
        for path in request.models:
            say(f"spectra of {path}")
            changes[path] = spectra(base, opened[path], request.patterns)
    return Comparison(request.base, losses, changes)


def _losses(
    request: Request, opened: Mapping[str, Matrices], say: Say
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for path, matrices in opened.items():
        if not (matrices.path / "config.yaml").exists():
            raise ConfigError(
                f"{path} is a Hugging Face folder, which has no held-out data to its name; convert "
                "it with llmtrain convert from-hf, or leave losses out with --no-eval"
            )
        say(f"evaluating {path}")
        result = evaluate_checkpoint(Path(path), request.overrides, request.device)
        found[path] = {name: metrics["loss"] for name, metrics in result.domains.items()}
    domains = list(found[request.base])
    for path, losses in found.items():
        lacking = [domain for domain in domains if domain not in losses]
        if lacking or not domains:
            raise ConfigError(
                f"{path} has no held-out text of {', '.join(lacking) or 'any domain'}; name the "
                "data for all of them, as in data.corpus=data/corpus, or leave losses out with "
                "--no-eval"
            )
    return found
