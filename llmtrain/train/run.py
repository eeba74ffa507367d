"""Assembling a run from its config, and ending it cleanly."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from llmtrain.checkpoint import HOOK_PREFIX, MODEL_PREFIX, OPTIM_PREFIX, Checkpointer
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.store import explain
from llmtrain.config import check_world, load_config, to_dict, to_yaml
from llmtrain.config.diff import diff_configs
from llmtrain.config.length import part_of_run
from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.data.loader import heldout_sets
from llmtrain.data.plan import DataPlan, build_plan
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.errors import EXIT_OK, CheckpointError, ConfigError, LlmtrainError
from llmtrain.eval.generation import Sampling, generate
from llmtrain.model import check_tensor_degree, flops_per_token, param_counts, resolve_model
from llmtrain.ops import cuda_fault, kernels_line, kernels_warning
from llmtrain.parallel import (
    World,
    build_layout,
    close_world,
    init_world,
    release_gathered,
    resolve_degrees,
)
from llmtrain.parallel.hardware import Precision, resolve_precision, tier_line
from llmtrain.train.aside import leave_behind
from llmtrain.train.begin import begin_with, begins_anew, find_init, find_needed, resume_with
from llmtrain.train.clockwork import Clockwork
from llmtrain.train.console import Console, human, table
from llmtrain.train.engine import build_module
from llmtrain.train.evaluation import Evaluation
from llmtrain.train.fitting import Setting
from llmtrain.train.frozen import left_out
from llmtrain.train.hooks import check_hooks, check_states, load_hooks
from llmtrain.train.metrics import Logger, build_loggers
from llmtrain.train.module import TrainModule
from llmtrain.train.recorder import Recorder
from llmtrain.train.saver import ResumePoint, Saver
from llmtrain.train.signals import SignalWatch
from llmtrain.train.throughput import Throughput, device_peak
from llmtrain.train.trainer import Services, Trainer
from llmtrain.train.watchdog import Watchdog

# A longer plan is left to its own command: what comes before step 1 fits on a screen.
_PLAN_LINES = 24
_CHANGE_LINES = 16


def train(cfg: RunConfig, world: World | None = None) -> int:
    """Train as ``cfg`` says; returns the exit code. Raises LlmtrainError for the user's faults.

    world: joined by the caller, who has several runs to make and leaves it afterwards; a process
    group that was left cannot be joined again under the same launcher.
    """
    _set_environment(cfg)
    with SignalWatch() as signals:
        joined = init_world(cfg.device) if world is None else world
        try:
            check_world(cfg, joined.size)
            _train(cfg, joined, signals)
        finally:
            if world is None:
                close_world()
    return EXIT_OK


def run_folder(cfg: RunConfig) -> Path:
    """The run's folder."""
    return Path(cfg.out) / cfg.name


def _train(cfg: RunConfig, world: World, signals: SignalWatch) -> None:
    times = Clockwork.from_config(cfg)
    console = Console(world.is_main, times.total)
    _set_numerics(cfg)
    plan = build_plan(cfg, times.total * cfg.train.global_batch_size)
    model_cfg = resolve_model(cfg, plan.vocab_size)
    check_tensor_degree(model_cfg, cfg.parallel.tensor)
    precision = resolve_precision(cfg.precision, world.device)
    folder = run_folder(cfg) / "checkpoints"
    hooks, begun = load_hooks(cfg), None
    setting = Setting(Ranks(world.cpu_group), cfg, model_cfg, plan)
    anew = begins_anew(cfg, folder, setting.ranks)
    if anew:  # Before the folder is made: what cannot start leaves none.
        check_hooks(hooks, cfg, plan)
        begun = find_init(setting, console.warn)
        find_needed(setting, hooks, {}, console.warn)
    with Checkpointer(folder, cfg.checkpoint, world.cpu_group) as checkpointer:
        saver = Saver(cfg, plan, world, checkpointer)
        resume = saver.find()
        for fault in resume.skipped if resume is not None else []:
            console.warn(fault)
        _preamble(console, cfg, world, times, plan, (model_cfg, precision))
        if resume is not None and resume.step >= times.stop:
            _say_nothing_to_do(console, cfg, resume)
            return
        assert model_cfg.n_kv_heads is not None
        layout = build_layout(cfg.parallel, world, model_cfg.n_kv_heads)
        module = build_module(cfg, model_cfg, precision, layout)
        evaluation = Evaluation(cfg, heldout_sets(cfg, plan.catalogue))
        if not anew:
            check_hooks(hooks, cfg, plan)
            if resume is None:  # no copy in the object store can be used
                begun = find_init(setting, console.warn)
                find_needed(setting, hooks, {}, console.warn)
        if resume is not None:
            check_states(hooks, resume.extra["hooks"])
            find_needed(setting, hooks, resume.extra["hooks"], console.warn)
            resume_with(module, resume.path, saver.loader(resume), setting.ranks)
        elif cfg.init is not None:
            assert begun is not None
            begin_with(module, begun, cfg.init, world)
            console.say(f"begins with the weights of {begun}")
        source = begun if resume is None else resume.path
        goes_on = resume is not None
        saver.left_out = left_out(cfg, model_cfg, source, goes_on, setting.ranks, console.warn)
        # Only now: what cannot start must leave the run's folder as it is.
        for line in leave_behind(run_folder(cfg), checkpointer, resume, world):
            console.say(line)
        recorder = _recorder(cfg, plan, times, (console, module, resume))
        try:
            with _watchdog(cfg, world) as watch:
                services = Services(times, evaluation, recorder, saver, watch)
                _drive(Trainer(cfg, world, module, plan, hooks, services), resume, signals)
        finally:
            recorder.close()


def _watchdog(cfg: RunConfig, world: World) -> Watchdog:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    ranks = (world.rank, world.rank - world.local_rank, here, world.size)
    return Watchdog(cfg.train.watchdog, run_folder(cfg) / "watch", ranks)


def _drive(trainer: Trainer, resume: ResumePoint | None, signals: SignalWatch) -> None:
    """Train, sample; what goes wrong is recorded before it is raised."""
    cfg, recorder = trainer.cfg, trainer.recorder
    try:
        if trainer.watch.before is not None:
            recorder.event(0 if resume is None else resume.step, f"before: {trainer.watch.before}")
        if resume is not None:
            trainer.load_state_dict(resume.step, resume.extra)
            # The module has its own by now; those of hooks that this run has not stay unread.
            others = (MODEL_PREFIX, OPTIM_PREFIX, HOOK_PREFIX)
            load = trainer.saver.loader(resume)
            load(resume.path, trainer.hook_tensors(), unused=others, verify=False)
            _say_resume(recorder.console, cfg, resume)
            what = "a snapshot in memory" if resume.snapshot else resume.path.name
            recorder.event(resume.step, f"resumed from {what}", quiet=True)
        trainer.run(signals)
        _samples(cfg, trainer.module, trainer.plan, recorder, trainer.step_done)
        _say_unigram(trainer)
        recorder.console.say(f"done: {trainer.step_done} steps; run folder {run_folder(cfg)}")
        trainer.saver.close()
    except LlmtrainError as error:
        if not isinstance(error, CheckpointError):  # those may need it
            trainer.saver.close()
        recorder.event(trainer.step_done, str(error), quiet=True)
        raise


def _set_environment(cfg: RunConfig) -> None:
    """What the libraries read when they start: before the first product and the first message."""
    if cfg.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # One algorithm, or NCCL picks by size and topology and sums in another order.
        os.environ.setdefault("NCCL_ALGO", "Ring")


def _set_numerics(cfg: RunConfig) -> None:
    torch.manual_seed(cfg.seed)
    if cfg.train.deterministic:
        torch.use_deterministic_algorithms(True)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if cfg.precision.compute != "fp32" else "highest")


def _recorder(
    cfg: RunConfig,
    plan: DataPlan,
    times: Clockwork,
    parts: tuple[Console, TrainModule, ResumePoint | None],
) -> Recorder:
    console, module, resume = parts
    world = module.layout.world
    flops = flops_per_token(module.model_cfg, cfg.data.seq_len)
    throughput = Throughput(flops, world.size, device_peak(world.device))
    position = (0, 0)
    if resume is not None:
        position = (resume.step, resume.samples * cfg.data.seq_len)
    loggers: list[Logger] = []

    def open_loggers() -> None:
        with explain(f"the records of the run cannot be written to {run_folder(cfg)}"):
            _write_run_files(cfg, plan)
            loggers.extend(build_loggers(cfg, run_folder(cfg), position, to_dict(cfg)))

    Ranks(world.cpu_group).on_main(open_loggers)
    return Recorder(cfg, module.layout, plan, times, throughput, (console, loggers))


def _preamble(
    console: Console,
    cfg: RunConfig,
    world: World,
    times: Clockwork,
    plan: DataPlan,
    model: tuple[ModelConfig, Precision],
) -> None:
    model_cfg, precision = model
    counts = param_counts(model_cfg)
    batch = cfg.train.global_batch_size
    console.say(tier_line(world.device, precision))
    if world.device.type == "cpu":
        if warning := kernels_warning():
            console.warn(warning)
        console.say(kernels_line())
    elif cfg.quantization is not None and (fault := cuda_fault()):
        console.warn(
            f"CUDA kernels: FP8 runs on torch's own casts, slower (the library is {fault})"
        )
    console.say(
        f"model: {human(counts['total'])} parameters ({human(counts['non_embedding'])} "
        f"without embeddings), {model_cfg.n_layers} layers, d_model {model_cfg.d_model}, "
        f"vocabulary {model_cfg.vocab_size}"
    )
    console.say(
        f"run: {cfg.name}, {times.total} steps x {batch} sequences x {cfg.data.seq_len} tokens = "
        f"{human(times.total * times.tokens_per_step)} tokens, {world.size} process"
        + ("" if world.size == 1 else f"es ({resolve_degrees(cfg.parallel, world.size)})")
    )
    late = [str(at) for at in cfg.checkpoint.keep_at if part_of_run(cfg, at) > 1]
    if late:
        console.warn(
            f"checkpoint.keep_at: {', '.join(late)} is after the end of the run "
            f"({cfg.train.duration}); no checkpoint will be kept there for a branch"
        )
    tree = plan.tree().splitlines()
    if len(tree) > _PLAN_LINES:
        hint = f"  {len(plan.names)} sources; `llmtrain data plan CONFIG` prints tokens and epochs"
        tree = [tree[0], hint]
    console.say("\n".join(tree))


def _say_resume(console: Console, cfg: RunConfig, resume: ResumePoint) -> None:
    where = f"a snapshot in memory on top of {resume.path}" if resume.snapshot else resume.path
    console.say(f"resumed from {where} after step {resume.step}")
    changes = _changes(cfg, resume)
    for line in changes[:_CHANGE_LINES]:
        console.say(f"  changed since then: {line}")
    if len(changes) > _CHANGE_LINES:
        more = len(changes) - _CHANGE_LINES
        console.say(f"  and {more} more; the run's config.yaml has everything")


def _say_nothing_to_do(console: Console, cfg: RunConfig, resume: ResumePoint) -> None:
    console.say(f"nothing to do: {resume.path} is already at step {resume.step}")
    changes = _changes(cfg, resume)
    for line in changes:
        console.say(f"  changed since then, without effect: {line}")
    if changes:
        console.say("  to train with this config: another name=, or --resume never")


def _changes(cfg: RunConfig, resume: ResumePoint) -> list[str]:
    """What differs from the config of the checkpoint, beside where to resume from."""
    try:
        old = load_config(resume.path / "config.yaml")
    except ConfigError:
        return ["the checkpoint's config.yaml is of another version; what else, cannot be told"]
    return [line for line in diff_configs(old, cfg) if not line.startswith("checkpoint.resume:")]


def _write_run_files(cfg: RunConfig, plan: DataPlan) -> None:
    folder = run_folder(cfg)
    (folder / "config.yaml").write_text(to_yaml(cfg), encoding="utf-8")
    plan.write(folder / "plan.json")


def _say_unigram(trainer: Trainer) -> None:
    """The held-out loss beside that of a model which knows token frequencies only."""
    unigram = trainer.plan.catalogue.unigram_losses()
    rows = [("held-out", "loss", "unigram loss")]
    for name, metrics in trainer.last_evaluation.items():
        if name in unigram:
            rows.append((name, f"{metrics['loss']:.4f}", f"{unigram[name]:.4f}"))
    if len(rows) > 1:
        for line in table(rows):
            trainer.recorder.console.say(line)


def _samples(
    cfg: RunConfig, module: TrainModule, plan: DataPlan, recorder: Recorder, step: int
) -> None:
    """Continue the configured prompts with the trained model."""
    if not cfg.eval.prompts or plan.tokenizer_path is None:
        return
    tokenizer: Tokenizer = load_tokenizer(plan.tokenizer_path)
    module.model.eval()
    context = module.model_cfg.max_seq_len
    assert context is not None
    # A longer prompt leaves half of the context, or what was asked for, to the continuation.
    room = context - min(cfg.eval.generate_tokens, context // 2)
    encoded = [(prompt, tokenizer.encode(prompt)[-room:]) for prompt in cfg.eval.prompts]
    texts = [(prompt, ids) for prompt, ids in encoded if ids]
    found = generate(
        module.model,
        [ids for _, ids in texts],
        cfg.eval.generate_tokens,
        context,
        Sampling(seed=cfg.seed),
        eos_id=tokenizer.eos_id,
    )
    for (prompt, _), new in zip(texts, found, strict=True):
        recorder.sample(step, prompt, tokenizer.decode(new.tokens))
    release_gathered(module.model)
