"""lm-evaluation-harness on a model of ours, driven directly (extra ``lm-eval``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.errors import ConfigError, EnvironmentFault
from llmtrain.eval.likelihood import TextModel
from llmtrain.eval.loading import Trained
from llmtrain.eval.sharing import SharedTextModel, main_asks
from llmtrain.parallel import Layout

MISSING = (
    "tasks need the package lm_eval, which is not installed: run pip install 'llmtrain[lm-eval]'"
)


@dataclass(frozen=True)
class TaskRequest:
    """tasks: names the harness knows. few_shot: examples before each question, None: the task's
    own number. limit: questions of each task, None: all. folder: with the user's own tasks."""

    tasks: Sequence[str]
    few_shot: int | None = None
    limit: int | None = None
    folder: str | None = None
    batch: int = 16


def harness_model(model: TextModel | SharedTextModel) -> Any:
    """``model`` as the harness's ``LM``. Raises EnvironmentFault where it is not installed."""
    try:
        from lm_eval.api.model import LM
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise  # one of its own requirements is missing
        raise EnvironmentFault(MISSING) from error

    class Adapter(LM):  # type: ignore[misc, unused-ignore]
        """Requests are ``Instance``s; what they ask lies in ``args``."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return model.loglikelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return model.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return model.continue_texts([request.args for request in requests])

    return Adapter()


def evaluate_tasks(
    trained: Trained, request: TaskRequest, layout: Layout
) -> dict[str, dict[str, float]] | None:
    """Task -> metric (``acc``, ``acc_stderr`` ...) -> value, by the harness; None on all ranks but
    the main one. Collective.

    layout: the main rank runs the harness as if alone, and the data ranks share the requests.
    Raises EnvironmentFault where the harness is not installed, ConfigError for a task that it does
    not know.
    """
    model = TextModel(trained, request.batch)
    return main_asks(model, layout, lambda shared: _run(shared, request))


def _run(model: SharedTextModel, request: TaskRequest) -> dict[str, dict[str, float]]:
    adapter = harness_model(model)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=request.folder)
    for task in request.tasks:
        if not manager.match_tasks([task]):
            raise ConfigError(
                f"--tasks: lm-evaluation-harness knows no task {task!r}; `lm-eval ls tasks` lists "
                "them, and --task-folder names a folder of your own"
            )
    results = simple_evaluate(
        model=adapter,
        tasks=list(request.tasks),
        num_fewshot=request.few_shot,
        limit=request.limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=0,
    )
    assert results is not None
    return {
        task: {
            # "acc,none": of a metric and a filter of the answers.
            key.removesuffix(",none"): float(value)
            for key, value in numbers.items()
            if isinstance(value, int | float) and key != "sample_len"
        }
        for task, numbers in results["results"].items()
    }
