"""Memory of a run's state under DeepSpeed."""

from __future__ import annotations

from llmtrain.model import param_counts
from llmtrain.parallel.zero import BUCKET
from llmtrain.planner.setting import Setting


def zero_state(setting: Setting) -> dict[str, int]:
    """Bytes on a rank by kind (Rajbhandari et al. 2020, 1910.02054, section 5).

    ZeRO 1 shards masters and optimizer over the data ranks, 2 the gradients too, 3 the compute
    copies too, of which two blocks and what is outside the blocks are gathered at a time.
    Gradients are summed in float32 whatever they are computed in, and reduced through a bucket.
    ``(host)``: offloaded.
    """
    cfg, item, ranks = setting.cfg, setting.item, setting.degrees.data
    stage = cfg.parallel.zero_stage or 3
    counts = param_counts(setting.model)
    n_params = counts["total"] // setting.degrees.tensor
    hidden = counts["hidden"] // setting.degrees.tensor
    moments = 1 if cfg.optim.name == "lion" else 2
    copies, gradients = item * n_params, 4 * n_params
    if stage == 1 and item == 2:
        gradients += item * n_params
    if stage > 1:
        gradients = gradients // ranks + 4 * min(BUCKET, n_params)
    if stage == 3:
        gathered = n_params - hidden + 2 * hidden // setting.model.n_layers
        copies = copies // ranks + item * gathered
    place = " (host)" if cfg.parallel.offload_optimizer else ""
    return {
        f"weights (fp32){place}": 4 * n_params // ranks,
        f"optimizer state{place}": 4 * moments * n_params // ranks,
        "gradients (fp32)": gradients,
        "compute copies": copies,
    }
