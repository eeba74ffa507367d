"""Metrics on disk: ``metrics.jsonl`` of the run, and TensorBoard, W&B, MLflow beside it."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from llmtrain.config.schema import RunConfig
from llmtrain.errors import EnvironmentFault

Record = dict[str, Any]


def _jsonable(value: Any) -> Any:
    """JSON has no NaN or infinity: they become strings that ``float`` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    return value


def read_records(path: Path) -> Iterator[Record]:
    """Records of a metrics file; a last line cut off by a kill, and damaged lines, are left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


class Logger(Protocol):
    """Somewhere records go."""

    def write(self, record: Record) -> None:
        """Take one record (see docs/guide/metrics.md for the kinds)."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...


class JsonlLogger:
    """Appends one JSON object per line, flushed, so that a killed run loses at most a line."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Drop what lies beyond ``resume_step`` (steps that will be made again), then append."""
        if path.exists():
            kept = [r for r in read_records(path) if r["step"] <= resume_step]
            aside = path.with_suffix(".tmp")
            aside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
            os.replace(aside, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append ``record``."""
        self._file.write(json.dumps(_jsonable(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record as flat ``group/name`` scalars, for plotting services."""
    out: dict[str, float] = {}
    if record["kind"] == "step":
        for key in ("loss", "grad_norm", "lr", "tokens_per_second", "mfu", "memory_bytes"):
            if record.get(key) is not None:
                out[f"train/{key}"] = float(record[key])
        for key, value in record.get("method", {}).items():
            out[f"train/{key}"] = float(value)
        for name, source in record["sources"].items():
            for key, value in source.items():
                if value is not None:
                    out[f"source/{name}/{key}"] = float(value)
    elif record["kind"] == "mixture":
        out.update({f"mixture/{name}": float(w) for name, w in record["weights"].items()})
    elif record["kind"] in ("eval", "eval_of"):
        group = f"eval_{record['weights']}" if record["kind"] == "eval_of" else "eval"
        for name, domain in record["domains"].items():
            for key in ("loss", "perplexity", "bits_per_byte"):
                if domain.get(key) is not None:
                    out[f"{group}/{name}/{key}"] = float(domain[key])
        out[f"{group}/mean_loss"] = float(record["mean_loss"])
    elif record["kind"] == "numerics":
        for layer, roles in record["tensors"].items():
            for role, values in roles.items():
                for key in ("underflow", "overflow", "rms", "max"):
                    out[f"numerics_{key}/{layer}/{role}"] = float(values[key])
    return out


class TensorBoardLogger:
    """TensorBoard events in the run's ``tensorboard`` folder; the x axis is tokens."""

    def __init__(self, folder: Path, resume_tokens: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=resume_tokens + 1)

    def write(self, record: Record) -> None:
        """Write the scalars, and samples and events as text."""
        for key, value in scalars(record).items():
            self._writer.add_scalar(key, value, record["tokens"])
        if record["kind"] in ("sample", "event"):
            self._writer.add_text(record["kind"], record["text"], record["tokens"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def _service_id(file: Path, fresh: str) -> str:
    """The run's id at a service, kept in the run's folder so that a resumed run goes on there."""
    if not file.exists():
        file.write_text(fresh, encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


class WandbLogger:
    """Weights & Biases (extra ``wandb``)."""

    def __init__(self, cfg: RunConfig, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise EnvironmentFault(
                "log.wandb is set but wandb is not installed; pip install 'llmtrain[wandb]'"
            ) from error
        self._run: Any = wandb.init(
            project=cfg.log.wandb,
            name=cfg.name,
            id=_service_id(folder / "wandb_id", secrets.token_hex(8)),
            resume="allow",
            config=config,
        )
        # Steps of W&B may not go back, as a resumed run's do; tokens may.
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")

    def write(self, record: Record) -> None:
        """Log the scalars over tokens."""
        values = scalars(record)
        if values:
            self._run.log({**values, "tokens": record["tokens"]})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowLogger:
    """MLflow (extra ``mlflow``)."""

    def __init__(self, cfg: RunConfig, folder: Path, config: dict[str, Any]) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise EnvironmentFault(
                "log.mlflow is set but mlflow is not installed; pip install 'llmtrain[mlflow]'"
            ) from error
        self._mlflow: Any = mlflow
        mlflow.set_experiment(cfg.log.mlflow)
        known = folder / "mlflow_id"
        if known.exists():
            mlflow.start_run(run_id=known.read_text(encoding="utf-8").strip())
            return
        started = mlflow.start_run(run_name=cfg.name)
        _service_id(known, started.info.run_id)
        mlflow.log_dict(config, "config.json")

    def write(self, record: Record) -> None:
        """Log the scalars at the record's step."""
        values = {k.replace("/", "."): v for k, v in scalars(record).items()}
        if values:
            self._mlflow.log_metrics(values, step=record["step"])

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


def build_loggers(
    cfg: RunConfig, folder: Path, resume: tuple[int, int], config: Record
) -> list[Logger]:
    """The loggers the config names; ``metrics.jsonl`` always. resume: (step, tokens) resumed at."""
    loggers: list[Logger] = [JsonlLogger(folder / "metrics.jsonl", resume[0])]
    if cfg.log.tensorboard:
        loggers.append(TensorBoardLogger(folder / "tensorboard", resume[1]))
    if cfg.log.wandb:
        loggers.append(WandbLogger(cfg, folder, config))
    if cfg.log.mlflow:
        loggers.append(MlflowLogger(cfg, folder, config))
    return loggers
