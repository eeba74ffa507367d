"""Memory of a run's state and what a step moves between ranks under DeepSpeed."""

from __future__ import annotations

from llmtrain.model import param_counts, whole_weights
from llmtrain.parallel.zero import BUCKET
from llmtrain.planner.adapters import adapter_sizes
from llmtrain.planner.communication import (
    ALL_GATHER,
    ALL_REDUCE,
    REDUCE_SCATTER,
    Traffic,
    adapted_layers,
    shared_heads,
    tensor_ends,
    tensor_layers,
)
from llmtrain.planner.setting import Setting


def zero_state(setting: Setting) -> dict[str, int]:
    """Bytes on a rank by kind (Rajbhandari et al. 2020, 1910.02054, section 5).

    ZeRO 1 shards masters and optimizer over the data ranks, 2 the gradients too, 3 the compute
    copies too, of which two blocks and what is outside the blocks are gathered at a time.
    Gradients are summed in float32 whatever they are computed in, and reduced through a bucket.
    ``(host)``: offloaded. Beside adapters, frozen weights are compute copies alone.
    """
    cfg, item, ranks = setting.cfg, setting.item, setting.degrees.data
    stage = cfg.parallel.zero_stage or 3
    counts = param_counts(setting.model)
    whole = whole_weights(setting.model)
    n_params = (counts["total"] - whole) // setting.degrees.tensor + whole
    hidden = (counts["hidden"] - whole) // setting.degrees.tensor + whole
    adapters = _adapters(setting)
    n_params += adapters[0]
    trained = adapters[0] or n_params
    moments = 1 if cfg.optim.name == "lion" else 2
    copies, gradients = item * n_params, 4 * trained
    if stage == 1 and item == 2:
        gradients += item * trained
    if stage > 1:
        gradients = gradients // ranks + 4 * min(BUCKET, trained)
    if stage == 3:
        gathered = n_params - hidden + 2 * hidden // setting.model.n_layers
        copies = copies // ranks + item * gathered
    place = " (host)" if cfg.parallel.offload_optimizer else ""
    return {
        f"weights (fp32){place}": 4 * trained // ranks,
        f"optimizer state{place}": 4 * moments * trained // ranks,
        "gradients (fp32)": gradients,
        "compute copies": copies,
    }


def _adapters(setting: Setting) -> tuple[int, int]:
    """``adapter_sizes`` beside frozen weights, else zeros; about those of a tensor rank."""
    section = setting.model.adapters
    if section is None or not section.freeze:
        return 0, 0
    every, summed = adapter_sizes(setting.model)
    return summed + (every - summed) // setting.degrees.tensor, summed


def zero_traffic(setting: Setting) -> list[Traffic]:
    """Collectives of a step under DeepSpeed; groups of one rank and single numbers left out.

    N parameters of this rank's tensor part, m micro-batches. ZeRO 1 all-reduces N gradients a
    step, ZeRO 2 after every micro-batch, in ``precision.reduce`` through a bucket; both gather N
    updated parameters in the compute dtype. ZeRO 3 reduce-scatters N gradients after every
    micro-batch and gathers parameters for forward and again for backward: 2 N a micro-batch is
    its most, since what is needed again soon is not freed in between. Paddings are left out. Beside
    adapters only theirs are reduced, and gathered under ZeRO 1 and 2.
    """
    degrees, m, n_layers = setting.degrees, setting.micro_batches, setting.model.n_layers
    blocks = range(n_layers)
    counts = param_counts(setting.model)
    norms = counts["norm"]
    whole = norms + whole_weights(setting.model)
    n = (counts["total"] - whole) // degrees.tensor + whole
    stage = setting.cfg.parallel.zero_stage or 3
    adapters, summed = _adapters(setting)
    n += adapters
    trained = adapters or n
    buckets = -(-trained // BUCKET)
    if setting.model.adapters is None:
        found = tensor_layers(setting, blocks) + shared_heads(setting, blocks)
    else:
        found = adapted_layers(setting, setting.stages(0))
    found += tensor_ends(setting, True, True)
    if setting.sequence:
        own = 4 * ((summed if adapters else whole) // degrees.data)
        found.append(Traffic("norm gradients", ALL_REDUCE, "tensor", degrees.tensor, 1, own))
    times = 1 if stage == 1 else m
    reduced = times * trained * setting.precision.reduce.itemsize
    kind = REDUCE_SCATTER if stage == 3 else ALL_REDUCE
    found.append(Traffic("gradients", kind, "data", degrees.data, times * buckets, reduced))
    if stage == 3:
        calls, gathered = 2 * m * (n_layers + 2), 2 * m * n * setting.item
        what = "parameters, at most"
    else:
        roles = ("embedding", "hidden", "norm", "head", "bias")
        calls = 1 if adapters else sum(1 for role in roles if counts[role])
        gathered = trained * setting.item
        what = "parameters"
    found.append(Traffic(what, ALL_GATHER, "data", degrees.data, calls, gathered))
    return [t for t in found if t.ranks > 1 and t.calls > 0]
