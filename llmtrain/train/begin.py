"""Weights of another run: a new run begins with them, or they are evaluated where they stand."""

from __future__ import annotations

from pathlib import Path

from llmtrain.checkpoint import HOOK_PREFIX, MODEL_PREFIX, OPTIM_PREFIX, read_files
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.layout import read_layout
from llmtrain.checkpoint.loading import find, load_into
from llmtrain.config import RunConfig
from llmtrain.config.continual import InitConfig
from llmtrain.data.loader import heldout_sets
from llmtrain.data.plan import DataPlan, build_plan
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.model import ADAPTER, resolve_model
from llmtrain.parallel import World, build_layout
from llmtrain.parallel.hardware import resolve_precision
from llmtrain.train.clockwork import Clockwork
from llmtrain.train.engine import build_module
from llmtrain.train.evaluation import Evaluation
from llmtrain.train.module import TrainModule

Metrics = dict[str, dict[str, float]]
_TOKENIZER = "tokenizer.json"


def begin_with(module: TrainModule, plan: DataPlan, init: InitConfig, world: World) -> Path:
    """Replace the module's weights by those of the checkpoint that ``init`` names; returns it.

    The optimizer's moments too where asked for. Collective. Raises ConfigError naming what does
    not fit: shapes, or the tokenizer where both are known.
    """
    ranks = Ranks(world.cpu_group)
    prefixes = (MODEL_PREFIX, OPTIM_PREFIX) if init.optimizer else (MODEL_PREFIX,)
    unused = (HOOK_PREFIX,) if init.optimizer else (OPTIM_PREFIX, HOOK_PREFIX)
    try:
        prefix = "" if init.optimizer else MODEL_PREFIX
        path, _ = find(ranks, Path(init.path).expanduser(), prefix)
        _check_tokenizer(ranks, path, plan)
        stored = ranks.on_main(lambda: set(read_layout(path)))
        module.restore(
            lambda tensors: load_into(
                ranks,
                path,
                {
                    key: value
                    for key, value in tensors.items()
                    if key.startswith(prefixes) and (ADAPTER not in key or key in stored)
                },
                unused,
                False,
            )
        )
    except CheckpointError as error:
        raise ConfigError(f"init.path: {error}") from error
    return path


def _check_tokenizer(ranks: Ranks, path: Path, plan: DataPlan) -> None:
    def compare() -> None:
        theirs = read_files(path).get(_TOKENIZER)
        ours = plan.catalogue.tokenizer_files().get(_TOKENIZER)
        if theirs is not None and ours is not None and theirs != ours:
            raise CheckpointError(
                f"{path} was trained with another tokenizer than the data's; prepare the data "
                "with its tokenizer.json (prepare.tokenizer.kind: file)"
            )

    ranks.on_main(compare)


def evaluate_weights(cfg: RunConfig, path: Path, world: World) -> Metrics:
    """Held-out metrics of a checkpoint's weights under the layout of ``cfg``; collective.

    Domain -> loss, perplexity, bits_per_byte, tokens. Raises LlmtrainError.
    """
    plan = build_plan(cfg, Clockwork.from_config(cfg).total * cfg.train.global_batch_size)
    model_cfg = resolve_model(cfg, plan.vocab_size)
    assert model_cfg.n_kv_heads is not None
    layout = build_layout(cfg.parallel, world, model_cfg.n_kv_heads)
    module = build_module(cfg, model_cfg, resolve_precision(cfg.precision, world.device), layout)
    begin_with(module, plan, InitConfig(str(path)), world)
    return Evaluation(cfg, heldout_sets(cfg, plan.catalogue)).run(module)
