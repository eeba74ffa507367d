"""Texts and requests shared between processes: each answers its part of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.finding import find
from llmtrain.config import load_config
from llmtrain.config.parallel import ParallelConfig
from llmtrain.errors import CheckpointError, EnvironmentFault
from llmtrain.eval.generation import Continuation, Sampling, check_prompts, generate
from llmtrain.eval.likelihood import TextModel
from llmtrain.eval.loading import Trained, load_trained
from llmtrain.parallel import Layout, World, build_layout

R = TypeVar("R")
# The others wait for the main rank's downloads; a process that dies ends them sooner.
PATIENCE_MINUTES = 24 * 60.0


def answer_layout(world: World, tensor: int, checkpoint: Path) -> Layout:
    """Groups of ``tensor`` ranks that share a model, whatever layout it was trained under.

    checkpoint: a folder of one, for the heads that a layout over tensor ranks goes by. Raises
    EnvironmentFault where ``tensor`` does not divide the number of processes. Collective.
    """
    if world.size % tensor:
        raise EnvironmentFault(
            f"--tensor: {tensor} processes cannot share each model where there are {world.size}; "
            "start a multiple with torchrun, or lower it"
        )
    shape = load_config(checkpoint / "config.yaml").model
    parallel = ParallelConfig(tensor=tensor, replicate=world.size // tensor)
    return build_layout(parallel, world, shape.n_kv_heads or shape.n_heads)


def load_together(
    path: Path, world: World, tensor: int = 1, overrides: Sequence[str] = ()
) -> tuple[Trained, Layout]:
    """A checkpoint's model on every group of ``tensor`` ranks (see ``load_trained``), and the
    layout. Raises LlmtrainError also where processes found different checkpoints. Collective."""
    if tensor == 1:
        layout = build_layout(ParallelConfig(replicate=world.size), world, 1)
    else:
        # Each rank verifies its share of the files.
        found, _ = find(Ranks(world.cpu_group), path.expanduser(), "model.")
        layout = answer_layout(world, tensor, found)
    trained = load_trained(path, world.device, overrides, layout)
    paths = Ranks(world.cpu_group).reduce(lambda: str(trained.path), set)
    if len(paths) > 1:
        raise CheckpointError(
            f"{path}: a checkpoint was saved meanwhile, and processes loaded different ones "
            f"({', '.join(sorted(paths))}); name one"
        )
    return trained, layout


class Shared:
    """Lists of which every data rank answers each ``degrees.data``-th element."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.ranks = layout, Ranks(layout.world.cpu_group)

    def answer(self, count: int, own: Callable[[list[int]], list[R]]) -> list[R]:
        """Answers of all ranks in order, on every rank. own: answers the elements of these numbers
        out of ``count``. Fails on all ranks where it fails on one. Collective."""
        degree = self.layout.degrees.data
        numbers = list(range(self.layout.data_rank, count, degree))
        counts = self.layout.tensor_rank == 0

        def answered() -> list[tuple[int, R]]:
            found = list(zip(numbers, own(numbers) if numbers else [], strict=True))
            return found if counts else []

        def in_order(parts: list[list[tuple[int, R]]]) -> list[R]:
            whole = dict(pair for part in parts for pair in part)
            return [whole[number] for number in range(count)]

        return self.ranks.reduce(answered, in_order)


def generate_shared(
    trained: Trained,
    layout: Layout,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    sampling: Sampling,
    batch: int,
) -> list[Continuation]:
    """``generate`` with the prompts shared between the data ranks; all get all texts, those of one
    process. Raises LlmtrainError for a prompt that is empty or leaves no room. Collective."""
    context = trained.model_cfg.max_seq_len
    assert context is not None and trained.tokenizer is not None
    check_prompts(prompts, context)
    eos = trained.tokenizer.eos_id

    def own(numbers: list[int]) -> list[Continuation]:
        mine = [prompts[i] for i in numbers]
        return generate(trained.model, mine, new_tokens, context, sampling, eos_id=eos, batch=batch)

    return Shared(layout).answer(len(prompts), own)


class SharedTextModel:
    """A ``TextModel`` whose requests come from the main rank and are answered by all.

    The main rank calls it as it would call a ``TextModel``, and ``dismiss`` at last; all others
    call ``serve``, which returns then. A failure while answering is raised on every rank.
    """

    def __init__(self, model: TextModel, layout: Layout) -> None:
        self.model, self.shared = model, Shared(layout)
        self._parted = False

    def loglikelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """See ``TextModel.loglikelihoods``."""
        found: list[tuple[float, bool]] = self._ask("loglikelihoods", pairs)
        return found

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """See ``TextModel.rolling``."""
        found: list[float] = self._ask("rolling", texts)
        return found

    def continue_texts(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """See ``TextModel.continue_texts``."""
        found: list[str] = self._ask("continue_texts", asked)
        return found

    def serve(self) -> None:
        """Answer this rank's part of what the main rank asks, until it dismisses."""
        while (order := self._order(None)) is not None:
            self._answer(*order)

    def dismiss(self) -> None:
        """Let the others go; nothing where a failure has parted the ranks."""
        if not self._parted:
            self._order(None)

    def _ask(self, kind: str, items: Sequence[Any]) -> list[Any]:
        order = self._order((kind, list(items)))
        assert order is not None
        return self._answer(*order)

    def _order(self, order: tuple[str, list[Any]] | None) -> tuple[str, list[Any]] | None:
        return self.shared.ranks.on_main(lambda: order)

    def _answer(self, kind: str, items: list[Any]) -> list[Any]:
        def own(numbers: list[int]) -> list[Any]:
            mine = [items[i] for i in numbers]
            if kind == "continue_texts":
                return self.model.continue_texts(mine, numbers)
            found: list[Any] = getattr(self.model, kind)(mine)
            return found

        self._parted = True
        found = self.shared.answer(len(items), own)
        self._parted = False
        return found


def main_asks(model: TextModel, layout: Layout, ask: Callable[[SharedTextModel], R]) -> R | None:
    """The value of ``ask`` on the main rank; the others answer what it asks, and get None."""
    shared = SharedTextModel(model, layout)
    if not layout.world.is_main:
        shared.serve()
        return None
    try:
        found = ask(shared)
    except Exception:
        shared.dismiss()
        raise
    shared.dismiss()
    return found
