"""µnit Scaling in FP8 with static scales (Narayan et al., ICML 2025, 2502.05967)."""

from __future__ import annotations

from typing import Any

from llmtrain.recipes.experiment import MINI_SOURCES, Claim, Experiment, Trial, mini_run

PARAMETRIZATIONS = ("mus", "standard")
# Where there is no bf16 hardware, operands of the same products rounded to its 7 bits of mantissa.
_BF16 = {"format": "fake", **dict.fromkeys(("weights", "inputs", "gradients"), "e5m7")}
_FP8 = {"format": "mus_fp8"}


def _trials(scale: str) -> list[Trial]:
    """Both formats of both parametrisations, and in the miniature one run in fp32, which shows
    how far runs move apart by rounding that costs nothing."""
    mini = scale == "mini"
    formats = {"BF16": _BF16 if mini else None, "FP8": _FP8}
    found = [
        Trial(f"{name} {kind}", _run(scale, name, section))
        for name in PARAMETRIZATIONS
        for kind, section in formats.items()
    ]
    return [*found, Trial("mus FP32", _run(scale, "mus", None))] if mini else found


def _run(scale: str, name: str, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """The same casts and the same rule for the gradients' constant in both parametrisations.
    Layers, batch and steps are equal; the learning rate is each one's own good one."""
    sections = {} if quantization is None else {"quantization": quantization}
    scaling: dict[str, Any] = {"parametrization": name}
    if name == "mus":
        scaling |= {"base_width": 64 if scale == "mini" else 256, "tau": _tau(scale)}
    shape: dict[str, Any] = {"activation": "gelu", "norm": "layernorm", "scaling": scaling}
    if name == "mus":
        shape["norm_placement"] = "post_branch"
    if scale == "mini":
        data = {"seq_len": 64, "block_size": 16, "weights": dict.fromkeys(MINI_SOURCES, 1.0)}
        run = mini_run(150, data=data, **sections)
        run["model"] = {"d_model": 64, "n_layers": 4, "n_heads": 4, "d_ff": 256, **shape}
        rate = 0.1 if name == "mus" else 3.0e-3
        run["optim"] = {"lr": rate, "weight_decay": 1.0e-4, "decoupled": "fully"}
        return run
    # Table 4 of the paper: 1B and 7B.
    width, layers, heads, batch, steps = (
        (2048, 24, 16, 1024, 7500) if scale == "small" else (4096, 32, 32, 2048, 16700)
    )
    return {
        "model": {"d_model": width, "n_layers": layers, "n_heads": heads, **shape},
        "data": {
            "sources": {"text": {"path": "data/text"}},
            "seq_len": 4096,
            "weights": {"text": 1},
        },
        "optim": {
            "name": "lion",
            "lr": 2.0e-3 if name == "mus" else 1.0e-4,
            "betas": [0.9, 0.99],
            "weight_decay": 1.0e-4,
            "decoupled": "fully",
        },
        "schedule": {"name": "cosine", "min_factor": 0.1},
        "train": {"duration": f"{steps}step", "global_batch_size": batch, "micro_batch_size": 4},
        "checkpoint": {"every": "1000step"},
        **sections,
    }


def _tau(scale: str) -> float:
    """0.4 at depth 4 is the paper's; the others are to be swept (its table of them is lost)."""
    return {"mini": 0.4, "small": 0.3, "paper": 0.2}[scale]


EXPERIMENT = Experiment(
    name="mus-fp8",
    title="FP8 with static scales: unit scaling against the standard parametrisation",
    paper=(
        "Narayan et al., ICML 2025: with unit scaling, FP8 of all hidden layers at 1B to 13B ends "
        "within about 0.4-0.8% of the loss of BF16;",
        "standard FP8 with dynamic scales spikes and does not converge at 13B. Here the standard "
        "runs have the same static casts. BF16: the same run with the same products' operands "
        "rounded to 7 bits of mantissa.",
    ),
    trials=_trials,
    claims=(
        Claim("mus: FP8 within 0.5% of BF16", "mus FP8", "mus BF16", within=0.005),
        Claim("standard: static FP8 costs loss", "standard BF16", "standard FP8"),
        Claim("FP8: mus beats standard", "mus FP8", "standard FP8", decides=False),
        Claim(
            "noise: mus BF16 within 0.5% of FP32",
            "mus BF16",
            "mus FP32",
            within=0.005,
            decides=False,
        ),
    ),
    baseline="mus BF16",
    seeds=4,
)
