"""Rules between keys, and the size of the world."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llmtrain.config import RunConfig, check_config, check_world, from_dict
from llmtrain.errors import ConfigError

GOOD: dict[str, Any] = {
    "data.corpus": None,
    "data.sources": {"code": {"path": "a"}, "docs": {"path": "b"}},
    "data.weights": {"code": 3, "docs": 1},
    "data.tokenizer": "t",
}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` -> ``{"a": {"b": 1}}``."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        here = tree
        for parent in parents:
            here = here.setdefault(parent, {})
        here[last] = value
    return tree


def faults_of(changes: dict[str, Any], for_training: bool = True) -> list[str]:
    """Messages for the good configuration with ``changes``; empty when it is accepted."""
    try:
        from_dict(nested({**GOOD, **changes}), for_training=for_training)
    except ConfigError as error:
        lines = str(error).split("\n  ")
        return lines[1:] if len(lines) > 1 else lines
    return []


PHASES = [{"until": "0.5dur", "weights": {"code": 1}}, {"weights": {"docs": 1}}]
NO_WEIGHTS: dict[str, Any] = {"data.weights": {}}
ZERO: dict[str, Any] = {"parallel.engine": "deepspeed"}


@pytest.mark.parametrize(
    ("changes", "key", "part"),
    [
        ({"model.d_model": 250, "model.n_heads": 4}, "model.d_model", "not divisible by n_heads 4"),
        ({"parallel.zero_stage": 2}, "parallel.zero_stage", "read by DeepSpeed only"),
        ({"parallel.offload_optimizer": True}, "parallel.offload_optimizer", "DeepSpeed only"),
        ({**ZERO, "parallel.pipeline": 2}, "parallel.pipeline", "does not go together"),
        ({**ZERO, "parallel.context": 2}, "parallel.context", "does not go together"),
        ({**ZERO, "parallel.shard": 2}, "parallel.shard", "steers FSDP2"),
        ({**ZERO, "parallel.replicate": 2}, "parallel.replicate", "steers FSDP2"),
        (
            {**ZERO, "parallel.reshard_after_forward": False},
            "parallel.reshard_after_forward",
            "steers FSDP2",
        ),
        (
            {**ZERO, "parallel.reduce_every_micro_batch": True},
            "parallel.reduce_every_micro_batch",
            "steers FSDP2",
        ),
        ({**ZERO, "train.compile": True}, "train.compile", "does not go together"),
        ({"model.n_heads": 4, "model.n_kv_heads": 3}, "model.n_kv_heads", "does not divide"),
        ({"model.n_heads": 4, "model.n_kv_heads": 8}, "model.n_kv_heads", "does not divide"),
        ({"model.d_model": 28, "model.n_heads": 4}, "model.d_head", "even head width, not 7"),
        ({"model.d_head": 5}, "model.d_head", "even head width, not 5"),
        ({"model.max_seq_len": 255}, "model.max_seq_len", "shorter than data.seq_len 256"),
        ({"model.vocab_size": 100, "data.eos_id": 100}, "data.eos_id", "outside the vocabulary"),
        ({"data.phases": PHASES}, "data.weights", "stands beside data.phases"),
        ({"data.weights": {}}, "data.weights", "no mixture is given"),
        ({"data.weights": {"code": 0, "docs": 0}}, "data.weights", "all zero"),
        ({"data.weights": {"cdoe": 1}}, "data.weights.cdoe", "did you mean 'code'?"),
        ({"data.sources": {}, "data.weights": {"x": 1}}, "data.weights.x", "under data.sources"),
        (
            {
                "data.sources": {"code": {"path": "a", "loss_weight": 0}},
                "data.weights": {"code": 1},
            },
            "data.weights",
            "nothing would be learned",
        ),
        (
            {"data.sources": {"code": {}, "docs": {"path": "b"}}},
            "data.sources.code.path",
            "missing",
        ),
        (
            {"data.sources": {"a/b": {"path": "a"}}, "data.weights": {"a/b": 1}},
            "data.sources.a/b",
            "becomes the name of a folder",
        ),
        ({"data.heldout": {"h": {}}}, "data.heldout.h.path", "missing"),
        ({"data.corpus": ""}, "data.corpus", "is empty"),
        (
            {
                "data.corpus": "c",
                "prepare": {"out": "c", "sources": {"math": {"kind": "builtin", "domain": "math"}}},
                "data.weights": {"maths": 1},
            },
            "data.weights.maths",
            "did you mean 'math'?",
        ),
        (
            {**NO_WEIGHTS, "data.phases": [{"until": "0.5dur", "weights": {"code": 1}}]},
            "data.phases.0.until",
            "is not the end of the run",
        ),
        (
            {**NO_WEIGHTS, "data.phases": [PHASES[0], PHASES[0], PHASES[1]]},
            "data.phases.1.until",
            "not after the phase before it (until 0.5dur)",
        ),
        (
            {**NO_WEIGHTS, "data.phases": [{"weights": {"code": 1}}, {"weights": {"code": 1}}]},
            "data.phases.0.until",
            "leaves nothing for the phases after it",
        ),
        (
            {**NO_WEIGHTS, "data.phases": [{"until": "200step", "weights": {"code": 1}}]},
            "data.phases.0.until",
            "is not the end of the run",
        ),
        (
            {**NO_WEIGHTS, "data.phases": [PHASES[0], {"weights": {"docs": 0}}]},
            "data.phases.1.weights",
            "all zero",
        ),
        (
            {**NO_WEIGHTS, "data.phases": [PHASES[0], {"weights": {"dcs": 1}}]},
            "data.phases.1.weights.dcs",
            "did you mean 'docs'?",
        ),
        (
            {**NO_WEIGHTS, "data.phases": [{"weights": {"code": 1}, "ramp": "linear"}]},
            "data.phases.0.ramp",
            "no weights to ramp from",
        ),
        ({"eval.prompts": ["x"], "data.tokenizer": None}, "eval.prompts", "need a tokenizer"),
        ({"train.micro_batch_size": 5}, "train.micro_batch_size", "does not divide"),
        ({"train.micro_batch_size": 64}, "train.micro_batch_size", "use at most 32"),
        ({"train.stop_after": "101step"}, "train.stop_after", "after the end of the run"),
        # 100 steps of 32 x 256 tokens are 819,200 tokens.
        ({"train.stop_after": "819201tok"}, "train.stop_after", "after the end of the run"),
        (
            {"data.diet": {"samples": 160, "until": "5step"}},
            "data.diet.samples",
            "160 samples are not repeated by the 160 that the run draws until 5step",
        ),
        ({"schedule.warmup": "101step"}, "schedule.warmup", "longer than the run"),
        ({"schedule.warmup": "1Mtok"}, "schedule.warmup", "longer than the run"),
        (
            {"schedule.name": "wsd", "schedule.warmup": "0.5dur", "schedule.decay": "51step"},
            "schedule.decay",
            "together are longer than the run",
        ),
        ({"parallel.tensor": 8}, "parallel.tensor", "8 ranks cannot share n_heads 4 equally"),
        (
            {"parallel.tensor": 4, "model.n_heads": 24, "model.d_head": 8, "model.n_kv_heads": 6},
            "parallel.tensor",
            "cannot share n_kv_heads 6; one must divide the other",
        ),
        ({"parallel.tensor": 4, "model.d_ff": 50}, "parallel.tensor", "cannot share d_ff 50"),
        ({"parallel.pipeline_stages": 2}, "parallel.pipeline_stages", "with parallel.pipeline > 1"),
        (
            {"parallel.pipeline": 2, "parallel.pipeline_stages": 2},
            "parallel.pipeline_stages",
            "2 stages a rank do not go with pipeline_schedule 1f1b",
        ),
        (
            {
                "parallel.pipeline": 2,
                "parallel.pipeline_schedule": "zero_bubble",
                "parallel.pipeline_stages": 1,
            },
            "parallel.pipeline_stages",
            "zero_bubble runs several stages a rank",
        ),
        (
            {
                "parallel.pipeline": 2,
                "parallel.pipeline_schedule": "zero_bubble",
                "train.recompute": "full",
            },
            "train.recompute",
            "use selective, or pipeline_schedule interleaved",
        ),
        ({"parallel.pipeline": 5}, "parallel.pipeline", "more than the model's n_layers 4"),
        (
            {"parallel.pipeline": 2, "parallel.reduce_every_micro_batch": True},
            "parallel.reduce_every_micro_batch",
            "which reduces once a step",
        ),
        ({"parallel.context": 3}, "data.seq_len", "= 6 equal chunks; use 252 or 258"),
        ({"parallel.context": 200}, "data.seq_len", "= 400 equal chunks; use 400"),
        ({"hooks": [{}]}, "hooks.0.use", "is missing"),
        ({"hooks": [{"use": "a.b"}]}, "hooks.0.use", "is not an import path"),
        ({"hooks": [{"use": "a.b:C", "args": {"a b": 1}}]}, "hooks.0.args.a b", "cannot name"),
        ({"name": ""}, "name", "cannot name a folder"),
        ({"name": "../x"}, "name", "cannot name a folder"),
        ({"name": "/x"}, "name", "cannot name a folder"),
        ({"out": " "}, "out", "is empty"),
        ({"log.wandb": ""}, "log.wandb", "is empty"),
        ({"log.mlflow": ""}, "log.mlflow", "is empty"),
        ({"checkpoint.resume": ""}, "checkpoint.resume", "is empty"),
        ({"checkpoint.resume": "nevr"}, "checkpoint.resume", "did you mean 'never'?"),
        ({"prepare": {}}, "prepare.sources", "is missing"),
        ({"prepare.sources.a": {}}, "prepare.sources.a.paths", "kind text needs it"),
        ({"prepare.sources.a": {"kind": "builtin"}}, "prepare.sources.a.domain", "needs it"),
        ({"prepare.sources.a": {"kind": "hf"}}, "prepare.sources.a.hf_name", "needs it"),
        (
            {"prepare.sources.a": {"kind": "jsonl", "paths": ["x"], "hf_name": "y"}},
            "prepare.sources.a.hf_name",
            "is not read by kind jsonl; set kind: hf",
        ),
    ],
)
def test_a_combination_that_cannot_work(changes: dict[str, Any], key: str, part: str) -> None:
    [line] = faults_of(changes)
    assert line.startswith(f"{key}: ")
    assert part in line
    assert ";" in line or "did you mean" in line, f"no remedy in {line!r}"


SOURCE = {"prepare.sources.a": {"paths": ["x"]}}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({**SOURCE, "prepare.tokenizer.kind": "file"}, "prepare.tokenizer.path"),
        ({**SOURCE, "prepare.tokenizer.path": "x"}, "prepare.tokenizer.path"),
        ({**SOURCE, "prepare.tokenizer.eos_token": ""}, "prepare.tokenizer.eos_token"),
        ({**SOURCE, "prepare.compression": "lz4"}, "prepare.compression"),
        ({**SOURCE, "prepare.compression": "zstd:99"}, "prepare.compression"),
        ({**SOURCE, "prepare.out": ""}, "prepare.out"),
        (
            {**SOURCE, "prepare.out": "c", "data.corpus": "c", "model.vocab_size": 1000}
            | {"data.weights": {"a": 1}},
            "model.vocab_size",
        ),
        ({"prepare.sources": {"a b": {"paths": ["x"]}}}, "prepare.sources.a b"),
    ],
)
def test_a_corpus_that_cannot_be_prepared(changes: dict[str, Any], key: str) -> None:
    [line] = faults_of(changes)
    assert line.startswith(f"{key}: ")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.d_model": 250, "model.n_heads": 4, "model.d_head": 64},
        {"model.d_model": 28, "model.n_heads": 4, "model.position": "learned"},
        {"model.n_heads": 8, "model.n_kv_heads": 2},
        {**ZERO, "parallel.zero_stage": 1, "parallel.offload_optimizer": True},
        {**ZERO, "parallel.tensor": 2},
        {"model.max_seq_len": 256},
        {"parallel.context": 4, "parallel.context_method": "ring"},
        {"parallel.context": 1, "data.seq_len": 255},
        {"data.corpus": "c", "data.weights": {"anything": 1}},
        {"data.corpus": "c", "data.sources": {"x": {"max_epochs": 2}}, "data.weights": {"x": 1}},
        {**NO_WEIGHTS, "data.phases": PHASES},
        # The last phase may end in any unit where the run ends: 819,200 tokens.
        {**NO_WEIGHTS, "data.phases": [PHASES[0], {"until": "100step", "weights": {"docs": 1}}]},
        {**NO_WEIGHTS, "data.phases": [PHASES[0], {"until": "819.2Ktok", "weights": {"docs": 1}}]},
        {
            **NO_WEIGHTS,
            "train.duration": "1Mtok",
            "data.phases": [
                {"until": "300Ktok", "weights": {"code": 1}},
                {"until": "1Mtok", "weights": {"docs": 1}, "ramp": "linear"},
            ],
        },
        {"train.stop_after": "819200tok", "train.micro_batch_size": 8},
        {"schedule.name": "wsd", "schedule.warmup": "0.5dur", "schedule.decay": "50step"},
        {"schedule.warmup": "0.9dur", "schedule.decay": "0.9dur"},  # no decay in cosine
        {"train.duration": "1step", "schedule.name": "wsd"},
        {"checkpoint.resume": "runs/x/checkpoints/step-1"},
        {"name": "sweep/lr-1"},
        {"prepare.sources.a": {"kind": "hf", "hf_name": "x"}, "prepare.compression": "zstd:3"},
        {"hooks": [{"use": "my_pkg.mod_1:Hook", "args": {"a_b": 1}}]},
    ],
)
def test_a_combination_that_works(changes: dict[str, Any]) -> None:
    assert faults_of(changes) == []


def test_a_model_alone_is_a_configuration_but_not_a_run() -> None:
    cfg = from_dict({"model": {"d_model": 64}})
    check_config(cfg, for_training=False)
    with pytest.raises(ConfigError, match=r"^data\.weights: is missing: no mixture"):
        check_config(cfg)


def test_all_rules_speak_together_and_none_about_a_key_already_wrong() -> None:
    lines = faults_of(
        {
            "model.n_heads": "four",
            "model.n_kv_heads": 3,
            "train.micro_batch_size": 7,
            "train.stop_after": "200step",
            "data.weights": {"cdoe": 1},
            "schedule.warmup": "2dur",
        }
    )
    keys = [line.partition(": ")[0] for line in lines]
    assert keys == [
        "model.n_heads",
        "schedule.warmup",
        "data.weights.cdoe",
        "train.micro_batch_size",
        "train.stop_after",
    ]


def run(**train: Any) -> RunConfig:
    """A configuration with these parts of ``train`` and ``parallel``."""
    cfg = RunConfig()
    keys = ("shard", "replicate", "tensor", "context", "pipeline", "pipeline_schedule")
    parallel = {k: train.pop(k) for k in keys if k in train}
    return dataclasses.replace(
        cfg,
        train=dataclasses.replace(cfg.train, **train),
        parallel=dataclasses.replace(cfg.parallel, **parallel),
    )


@pytest.mark.parametrize(
    ("cfg", "world", "part"),
    [
        (run(shard=2), 4, "parallel.shard: shard 2 x replicate 1 = 2, but the run has 4"),
        (run(shard=3, replicate=2), 4, "parallel.shard: shard 3 x replicate 2 = 6"),
        (run(replicate=3), 4, "parallel.replicate: 3 does not divide the 4 process(es)"),
        (run(tensor=3), 4, "parallel.tensor: replicate 1 x tensor 3 = 3 does not divide the 4"),
        (run(shard=1, tensor=2, pipeline=3), 4, "shard 1 x replicate 1 x tensor 2 x pipeline 3 ="),
        (run(tensor=2, pipeline=2), 20, "batch_size: 32 cannot be shared equally: 5 ranks"),
        (run(pipeline=2, global_batch_size=1), 2, "of 1 are 1; raise train.global_batch_size"),
        (run(pipeline=2), 4, "1f1b over 2 pipeline ranks needs at least 2 micro-batches a step"),
        (run(pipeline=2, micro_batch_size=16), 4, "sequences in micro-batches of 16 are 1; lower"),
        (
            run(pipeline=4, pipeline_schedule="interleaved", micro_batch_size=4),
            16,
            "needs at least 4 micro-batches",
        ),
        (
            run(pipeline=3, pipeline_schedule="zero_bubble", micro_batch_size=8),
            3,
            "needs a multiple of 3 micro-batches a step, and a rank's 32",
        ),
        (run(), 5, "train.global_batch_size: 32 cannot be shared equally"),
        (run(), 5, "use 30 or 35"),
        (run(), 64, "use 64"),
        (run(micro_batch_size=16), 4, "train.micro_batch_size: 16 does not divide a rank's share"),
    ],
)
def test_a_run_that_does_not_fit_the_world(cfg: RunConfig, world: int, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world(cfg, world)
    assert part in str(caught.value) and str(caught.value).count("\n") == 0


def test_a_run_that_fits_the_world() -> None:
    check_world(run(), 1)
    check_world(run(shard=2, replicate=2, micro_batch_size=8), 4)
    check_world(run(replicate=4), 4)
    check_world(run(tensor=2, context=2, pipeline=2, micro_batch_size=16), 8)
    with pytest.raises(ConfigError, match="2 faults"):
        check_world(run(shard=2), 5)
