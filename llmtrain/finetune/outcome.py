"""What a sequence of tasks comes to: the matrix of losses and the numbers drawn from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from llmtrain.train.console import human, table

Matrix = list[list[float]]


@dataclass(frozen=True)
class Row:
    """What was measured after a task. losses: held-out loss by domain, nats per token.

    seconds: of training, and of what the method did besides (Fisher pass, merge). kept_bytes: in
    memory over all ranks besides model and optimizer; stored_bytes: models on disk that the merge
    read. replayed_tokens: of earlier tasks' sources. run: name of the run's folder, empty for a
    task that was trained already.
    """

    task: str
    losses: dict[str, float]
    seconds: float = 0.0
    beside_seconds: float = 0.0
    kept_bytes: int = 0
    stored_bytes: int = 0
    replayed_tokens: int = 0
    run: str = ""


@dataclass(frozen=True)
class Outcome:
    """matrix[i][j]: held-out loss of task j after task i, for the tasks done so far (rows) and
    all tasks (columns). domains: of each task."""

    name: str
    method: str
    tasks: list[str]
    domains: list[tuple[str, ...]]
    rows: list[Row] = field(default_factory=list)

    @property
    def matrix(self) -> Matrix:
        """Losses of every task after every task."""
        return [
            [math.fsum(row.losses[d] for d in own) / len(own) for own in self.domains]
            for row in self.rows
        ]

    def numbers(self) -> dict[str, float]:
        """Average loss, forgetting and backward transfer after the last task so far."""
        return numbers(self.matrix)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        rows = [vars(row) for row in self.rows]
        found: dict[str, Any] = {"name": self.name, "method": self.method, "tasks": self.tasks}
        found["domains"] = [list(own) for own in self.domains]
        return {**found, "rows": rows, "matrix": self.matrix, **self.numbers()}

    def lines(self) -> list[str]:
        """The matrix and its numbers as text."""
        rows = [("held-out loss after", *self.tasks, "average so far")]
        for i, losses in enumerate(self.matrix):
            mean = math.fsum(losses[: i + 1]) / (i + 1)
            cells = [f"{loss:.4f}" for loss in losses]
            rows.append((f"{i + 1} {self.tasks[i]}", *cells, f"{mean:.4f}"))
        found = self.numbers()
        words = [f"{key.replace('_', ' ')} {value:+.4f}" for key, value in found.items()]
        kept = max(row.kept_bytes for row in self.rows)
        seconds = math.fsum(row.seconds + row.beside_seconds for row in self.rows)
        return [
            f"{self.name}: {self.method}, {len(self.rows)} of {len(self.tasks)} tasks",
            *table(rows),
            "; ".join(words).replace("average loss +", "average loss "),
            f"training {seconds:.0f} s; {human(kept)}B kept in memory besides model and optimizer",
        ]


def numbers(matrix: Matrix) -> dict[str, float]:
    """Numbers of a matrix of losses R after its last row T (tasks counted from 1).

    average_loss: mean over j <= T of R[T][j]. forgetting: mean over j < T of R[T][j] less the
    smallest R[i][j] of j <= i < T (Chaudhry et al. 2018, 1801.10112, eq. 3, for losses).
    backward_transfer: mean over j < T of R[j][j] - R[T][j] (Lopez-Paz and Ranzato 2017,
    1706.08840, eq. 3, for losses: positive where later tasks helped). Zero with a single task.
    """
    last, count = matrix[-1], len(matrix)
    forgotten, moved = [], []
    for j in range(count - 1):
        forgotten.append(last[j] - min(matrix[i][j] for i in range(j, count - 1)))
        moved.append(matrix[j][j] - last[j])
    return {
        "average_loss": math.fsum(last[:count]) / count,
        "forgetting": math.fsum(forgotten) / max(count - 1, 1),
        "backward_transfer": math.fsum(moved) / max(count - 1, 1),
    }
