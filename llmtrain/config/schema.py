"""The typed tree that describes a run: every key a YAML file may have, with its default.

One class per section; ``config.fields`` says what a field's ``key`` may hold. Sections of methods
are in files of their own. Rules between fields live in ``config.check``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmtrain.config.adapters import AdapterConfig
from llmtrain.config.chat import ChatConfig
from llmtrain.config.continual import ContinualConfig, InitConfig, PenaltyConfig
from llmtrain.config.data_methods import DietConfig, ReweightConfig
from llmtrain.config.duration import Duration
from llmtrain.config.factorized import FactorizedConfig
from llmtrain.config.fields import dur, key
from llmtrain.config.filters import FilterConfig
from llmtrain.config.mixture_methods import OnlineConfig, ReplayConfig
from llmtrain.config.number_formats import NumericsConfig, QuantizationConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.rope import RopeScalingConfig
from llmtrain.config.scaling import ScalingConfig
from llmtrain.config.selection import SelectConfig
from llmtrain.config.sparsity import LotteryConfig, SparsityConfig
from llmtrain.config.trainable import TrainableConfig
from llmtrain.config.upkeep import CheckpointConfig, EvalConfig, GuardConfig, LogConfig
from llmtrain.config.watch import WatchdogConfig
from llmtrain.config.weight_methods import AverageConfig

ROLES = ("embedding", "hidden", "norm", "head", "bias", "adapter")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder. Presets for GPT-2, Llama, Qwen and OLMo-2 are in configs/models."""

    vocab_size: int | None = key(None, "tokens in the vocabulary; null: the tokenizer's", ge=2)
    vocab_multiple: int = key(64, "the vocabulary is padded up to a multiple of this", ge=1)
    d_model: int = key(256, "width of the residual stream", ge=1)
    n_layers: int = key(4, "number of blocks", ge=1)
    n_heads: int = key(4, "query heads", ge=1)
    n_kv_heads: int | None = key(None, "key/value heads; null: as many as n_heads", ge=1)
    d_head: int | None = key(None, "width of a head; null: d_model / n_heads", ge=1)
    d_ff: int | None = key(None, "width of the MLP; null: 4 d_model, or 8/3 d_model if gated", ge=1)
    max_seq_len: int | None = key(None, "longest sequence; null: data.seq_len", ge=1)
    norm: str = key("rmsnorm", "normalisation", choices=("rmsnorm", "layernorm"))
    norm_eps: float = key(1e-5, "added to the variance", gt=0)
    norm_bias: bool = key(False, "bias in the norms (GPT-2)")
    norm_placement: str = key(
        "pre",
        "pre: before each branch; post_branch: at the end of the branch (OLMo-2)",
        choices=("pre", "post_branch"),
    )
    position: str = key("rope", "position encoding", choices=("rope", "learned", "none"))
    rope_theta: float = key(10000.0, "base of the rotary frequencies", gt=0)
    rope_scaling: RopeScalingConfig | None = key(None, "stretching of the rotary frequencies")
    rope_fraction: float = key(1.0, "part of a head that rotary positions turn", gt=0, le=1)
    parallel_residual: bool = key(
        False, "attention and MLP both read the stream before the block (GPT-NeoX)"
    )
    activation: str = key(
        "swiglu",
        "MLP activation; gelu_tanh is GPT-2's approximation",
        choices=("swiglu", "gelu", "gelu_tanh", "relu", "silu"),
    )
    qk_norm: str = key(
        "none",
        "normalise queries and keys: over each head (Qwen3) or the whole width (OLMo-2)",
        choices=("none", "head", "full"),
    )
    attention_bias: bool = key(False, "bias on the q, k, v projections")
    attention_out_bias: bool = key(False, "bias on the attention output projection")
    mlp_bias: bool = key(False, "bias on the MLP projections")
    tie_embeddings: bool = key(False, "the head shares the embedding's weight")
    dropout: float = key(
        0.0, "dropped share of the embedding's and of each branch's output, in training", ge=0, lt=1
    )
    init_std: float = key(0.02, "standard deviation of the initial weights", gt=0)
    init_depth_scale: bool = key(True, "divide the std of output projections by sqrt(2 n_layers)")
    adapters: AdapterConfig | None = key(
        None, "low-rank adapters: train these and freeze the model's own weights"
    )
    factorized: FactorizedConfig | None = key(None, "hidden layers as two factors each")
    scaling: ScalingConfig = key(ScalingConfig)


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens when a corpus is prepared."""

    kind: str = key(
        "bpe", "bpe: train one; byte: UTF-8 bytes; file: load one", choices=("bpe", "byte", "file")
    )
    path: str | None = key(None, "kind file: a tokenizer.json or a folder that holds one")
    vocab_size: int = key(8192, "kind bpe: size to train", ge=257)
    train_bytes: int = key(30_000_000, "kind bpe: bytes of text to train on", ge=1)
    eos_token: str | None = key(
        None, "document separator; null: <|endoftext|>, or kind file: the tokenizer's own"
    )


@dataclass(frozen=True)
class TextSourceConfig:
    """One named source of raw text for ``llmtrain data prepare``."""

    kind: str = key("text", "what is read", choices=("builtin", "text", "jsonl", "parquet", "hf"))
    domain: str | None = key(
        None, "kind builtin: code, docs or math", choices=("code", "docs", "math", None)
    )
    paths: list[str] = key(list, "files, folders or globs; .gz and .zst are decompressed")
    field: str = key("text", "jsonl, parquet, hf: the field with the text")
    hf_name: str | None = key(None, "kind hf: dataset name or local path")
    hf_config: str | None = key(None, "kind hf: configuration name")
    hf_split: str = key("train", "kind hf: split")
    max_documents: int | None = key(None, "stop after so many documents", ge=1)
    max_bytes: int | None = key(None, "stop after so many bytes of text", ge=1)
    keep: dict[str, FilterConfig] = key(
        dict, "jsonl, parquet, hf: field: what it must be for the document to be kept"
    )
    chat: ChatConfig | None = key(None, "jsonl, parquet, hf: records are conversations")


@dataclass(frozen=True)
class PrepareConfig:
    """``llmtrain data prepare``: text to MDS shards."""

    out: str = key("data/corpus", "folder to write")
    sources: dict[str, TextSourceConfig] = key(dict, "name: source")
    tokenizer: TokenizerConfig = key(TokenizerConfig, "tokenizer")
    heldout_fraction: float = key(0.01, "share of documents held out, by hash", ge=0, lt=1)
    workers: int | None = key(None, "tokenizing processes; null: usable cores", ge=1)
    shard_bytes: int = key(64 << 20, "size of a shard", ge=1 << 12, lt=1 << 32)
    compression: str | None = key(None, "shard compression, e.g. zstd:3")
    max_bad_fraction: float = key(0.01, "stop when more of the records are bad", ge=0, le=1)


@dataclass(frozen=True)
class SourceConfig:
    """One tokenized source of the training mixture."""

    path: str = key("", "a prepared source folder, a file, a glob, or a remote address")
    format: str = key(
        "auto",
        "how it is stored",
        choices=("auto", "mds", "megatron", "npy", "datatrove", "foundry"),
    )
    dtype: str | None = key(
        None,
        "token dtype of raw files and of MDS columns of plain bytes; null: uint16 and int64",
        choices=("uint16", "uint32", "int32", "int64", None),
    )
    max_epochs: float | None = key(None, "repetition cap: fail at build time beyond it", gt=0)
    loss_weight: float = key(1.0, "weight of each of its tokens in the loss", ge=0)
    cache_bytes: int = key(8 << 30, "remote sources: local cache bound", ge=1 << 20)


@dataclass(frozen=True)
class PhaseConfig:
    """A stretch of the mixture schedule."""

    until: Duration = key(lambda: dur("1dur"), "where the phase ends", gt=0)
    weights: dict[str, float] = key(dict, "source: share of the tokens; normalised to sum 1", ge=0)
    ramp: str = key(
        "step",
        "step: constant weights; linear: from the previous phase's weights",
        choices=("step", "linear"),
    )
    until_lr: float | None = key(
        None,
        "in place of until: the learning rate has fallen to this part",
        gt=0,
        lt=1,
    )


@dataclass(frozen=True)
class DataConfig:
    """What the model reads."""

    corpus: str | None = key(None, "folder of `data prepare`: its sources become available by name")
    sources: dict[str, SourceConfig] = key(dict, "name: source, besides or instead of a corpus")
    weights: dict[str, float] = key(
        dict, "one phase for the whole run: source: share of the tokens; normalised to sum 1", ge=0
    )
    phases: list[PhaseConfig] = key(list, "mixture schedule; instead of weights")
    replay: ReplayConfig | None = key(None, "tokens of an earlier run's sources, besides")
    heldout: dict[str, SourceConfig] = key(dict, "name: held-out source; a corpus brings its own")
    seq_len: int = key(256, "tokens per sample", ge=2)
    block_size: int = key(1024, "samples per mixture block", ge=1, le=1024)
    document_mask: bool = key(False, "attention stays inside a document")
    reset_positions: bool = key(False, "positions start again at each document")
    eos_id: int | None = key(None, "document separator; null: the corpus's", ge=0)
    tokenizer: str | None = key(None, "tokenizer file or folder; null: the corpus's")
    prefetch: int = key(4, "batches read ahead", ge=0)
    select: SelectConfig | None = key(None, "train on some of the samples only, by their scores")
    diet: DietConfig | None = key(None, "repeat a small subset in the first part of the run")


@dataclass(frozen=True)
class LossConfig:
    """The training objective: weighted token cross-entropy."""

    z_loss: float = key(0.0, "weight of the squared log-sum-exp", ge=0)
    label_smoothing: float = key(0.0, "label smoothing", ge=0, lt=1)
    chunk_tokens: int = key(1024, "tokens whose logits exist at once", ge=1)


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer."""

    name: str = key("adamw", "optimizer", choices=("adamw", "lion"))
    lr: float = key(1e-3, "peak learning rate", gt=0)
    betas: list[float] = key(lambda: [0.9, 0.95], "moment decay rates", ge=0, lt=1, length=2)
    eps: float = key(1e-8, "AdamW epsilon", gt=0)
    weight_decay: float = key(0.1, "weight decay", ge=0)
    decoupled: str = key(
        "lr",
        "lr: decay times the current lr (AdamW as in torch); fully: times lr/peak only",
        choices=("lr", "fully"),
    )
    decay_roles: list[str] = key(
        lambda: ["embedding", "hidden", "head"], "roles of parameters that decay", choices=ROLES
    )
    lr_factors: dict[str, float] = key(
        dict, "role: factor on the learning rate", ge=0, key_choices=ROLES
    )
    clip_norm: float | None = key(1.0, "gradient norm bound; null: none", gt=0)


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run."""

    name: str = key(
        "cosine",
        "shape after the warmup",
        choices=("constant", "cosine", "linear", "inverse_sqrt", "wsd", "infinite"),
    )
    warmup: Duration = key(lambda: dur("0.02dur"), "linear warmup from zero")
    min_factor: float = key(0.1, "final learning rate over the peak", ge=0, le=1)
    decay: Duration = key(lambda: dur("0.2dur"), "wsd, infinite: length of the decay at the end")
    decay_shape: str = key(
        "linear", "wsd: shape of the decay", choices=("linear", "1-sqrt", "exponential")
    )
    cooldown: Duration = key(lambda: dur("0.4dur"), "infinite: from the peak to the constant rate")
    cooldown_shape: str = key("cosine", "infinite: shape", choices=("cosine", "inverse_sqrt"))
    constant_factor: float = key(0.55, "infinite: the constant rate over the peak", gt=0, le=1)
    restarts: list[Duration] = key(
        list, "where the schedule begins again: warmup (re-warm), then its shape (re-decay)", gt=0
    )


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats."""

    compute: str = key(
        "auto", "auto: bf16 where the hardware has it, else fp32", choices=("auto", "fp32", "bf16")
    )
    reduce: str = key("fp32", "gradient reduction over ranks", choices=("fp32", "bf16"))


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    duration: Duration = key(
        lambda: dur("100step"), "length of the run", gt=0, units=("step", "tok", "epoch")
    )
    stop_after: Duration | None = key(
        None, "stop early but keep the schedules of the whole run", gt=0
    )
    global_batch_size: int = key(32, "sequences per optimizer step, over all ranks", ge=1)
    micro_batch_size: int | None = key(
        None, "sequences per forward on a rank; null: all at once", ge=1
    )
    recompute: str = key("none", "activation recomputation", choices=("none", "selective", "full"))
    compile: bool = key(False, "torch.compile each block")
    deterministic: bool = key(False, "deterministic kernels, slower")
    gc_every: int = key(100, "steps between garbage collections; 0: leave it to Python", ge=0)
    watchdog: WatchdogConfig = key(WatchdogConfig)
    verify_replicas: Duration | None = key(
        None, "how often copies of the same weights on several ranks are compared", gt=0
    )


@dataclass(frozen=True)
class HookConfig:
    """A hook of the user's own or of a method: a class found by its import path."""

    use: str = key("", "package.module:Class")
    args: dict[str, Any] = key(dict, "keyword arguments of the class")


@dataclass(frozen=True)
class RunConfig:
    """The whole run."""

    name: str = key("run", "name of the run")
    out: str = key("runs", "the run's folder is out/name")
    seed: int = key(0, "seeds initialisation and data order", ge=0, lt=2**63)
    device: str = key("auto", "auto: CUDA where there is one", choices=("auto", "cpu", "cuda"))
    model: ModelConfig = key(ModelConfig)
    data: DataConfig = key(DataConfig)
    prepare: PrepareConfig | None = key(None, "the corpus this run needs, for `data prepare`")
    loss: LossConfig = key(LossConfig)
    optim: OptimConfig = key(OptimConfig)
    schedule: ScheduleConfig = key(ScheduleConfig)
    precision: PrecisionConfig = key(PrecisionConfig)
    parallel: ParallelConfig = key(ParallelConfig)
    train: TrainConfig = key(TrainConfig)
    eval: EvalConfig = key(EvalConfig)
    checkpoint: CheckpointConfig = key(CheckpointConfig)
    guard: GuardConfig = key(GuardConfig)
    log: LogConfig = key(LogConfig)
    reweight: ReweightConfig | None = key(
        None,
        "weights of samples and tokens by their losses",
        hook="llmtrain.methods.reweight:Reweight",
    )
    online: OnlineConfig | None = key(
        None,
        "mixture weights that follow held-out losses",
        hook="llmtrain.methods.online:OnlineMixture",
    )
    average: AverageConfig | None = key(
        None, "averaging of weights during training", hook="llmtrain.merge.training:averaging"
    )
    penalty: PenaltyConfig | None = key(
        None, "penalty on leaving an anchor", hook="llmtrain.finetune.penalty:Penalty"
    )
    init: InitConfig | None = key(None, "weights to begin with; null: random ones")
    continual: ContinualConfig | None = key(None, "tasks in sequence, for `llmtrain continual`")
    quantization: QuantizationConfig | None = key(
        None,
        "number formats of the hidden linear layers",
        hook="llmtrain.methods.quantization:QuantizationSwitch",
    )
    numerics: NumericsConfig | None = key(
        None, "measurements of FP8's range", hook="llmtrain.methods.numerics:Numerics"
    )
    sparsity: SparsityConfig | None = key(
        None,
        "which weights of the hidden linear layers exist",
        hook="llmtrain.methods.sparsity:sparsity",
    )
    trainable: list[TrainableConfig] = key(
        list,
        "which parameters train when; empty: all of them, all the time",
        hook="llmtrain.methods.trainable:PartialTraining",
    )
    lottery: LotteryConfig | None = key(None, "tickets, for `llmtrain sparsity lottery`")
    hooks: list[HookConfig] = key(list, "hooks by import path")
