"""GPUs and clusters that a plan can be made for: what the vendors say, and what of it is reached.

Rates are those of the data sheets, per GPU: dense bf16 peak, memory, memory bandwidth, NVLink
(or its like) in one direction, and the network card that a usual node gives each GPU. ``Reached``
holds the fractions of them that real kernels and collectives reach; they are the model's only
free numbers, the same for all GPUs, and ``calibrate`` sets ``factor`` by a measured run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llmtrain.errors import ConfigError


@dataclass(frozen=True)
class Reached:
    """What real programs reach.

    products: of the peak, by large matrix products, before losses by shape. memory: of the
    memory bandwidth. links, network: of the bandwidths.
    tensor_overlap, stage_overlap: parts of tensor-parallel collectives and of messages between
    pipeline stages that hide behind products. shard_overlap: part of a pass behind which FSDP2's
    collectives can hide. factor: all work of the GPU itself takes so many times longer.
    """

    products: float = 0.68
    memory: float = 0.8
    links: float = 0.8
    network: float = 0.8
    tensor_overlap: float = 0.5
    stage_overlap: float = 0.5
    shard_overlap: float = 0.9
    factor: float = 1.0


@dataclass(frozen=True)
class Machine:
    """One kind of GPU in its usual node.

    peak: FLOP/s in bf16, dense. memory: bytes that a program gets. bandwidth: of the memory,
    link: between the GPUs of a node, network: of a GPU's share of the network cards; bytes/s, one
    direction. units: multiprocessors, each of which computes one tile of a product at a time.
    attention: part of the peak that fused attention reaches: FlashAttention-2 0.35 on H100 (Shah
    et al. 2024, 2407.08608) and on A100 some 0.6 (Dao 2023); newer GPUs are taken to be like H100.
    node: GPUs that ``link`` joins. latencies: seconds of a collective on the links, and on top of
    it for each doubling of the nodes.
    """

    name: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    network: float
    units: int
    node: int = 8
    link_latency: float = 8e-6
    network_latency: float = 12e-6
    attention: float = 0.35
    reached: Reached = Reached()


def _gpu(
    name: str, peak: float, gib: float, rates: tuple[float, float, float], units: int
) -> Machine:
    """peak in TFLOP/s; rates of memory, link and network in GB/s."""
    memory, link, network = (rate * 1e9 for rate in rates)
    return Machine(name, peak * 1e12, gib * 2**30, memory, link, network, units)


MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        replace(_gpu("a100", 312, 79.2, (2039, 300, 25), 108), attention=0.6),
        _gpu("h100", 989.4, 79.1, (3350, 450, 50), 132),
        _gpu("h200", 989.4, 139.8, (4800, 450, 50), 132),
        _gpu("b200", 2250, 178.0, (8000, 900, 50), 148),
        replace(_gpu("gb200", 2500, 184.0, (8000, 900, 50), 148), node=72),
        _gpu("l40s", 362, 44.4, (864, 32, 12.5), 142),
        _gpu("mi300x", 1307.4, 191.5, (5300, 448, 50), 304),
    )
}


def machine_named(
    name: str,
    *,
    node: int | None = None,
    network_gbit: float | None = None,
    memory_gib: float | None = None,
    peak_tflops: float | None = None,
) -> Machine:
    """The machine of that name, with a user's own numbers where given. Raises ConfigError."""
    if name.lower() not in MACHINES:
        raise ConfigError(f"--gpu {name}: not in the table; choose from {', '.join(MACHINES)}")
    machine = MACHINES[name.lower()]
    own: dict[str, float | int] = {}
    for key, value, scale in (
        ("network", network_gbit, 1e9 / 8),
        ("memory", memory_gib, 2.0**30),
        ("peak", peak_tflops, 1e12),
    ):
        if value is not None:
            if not 0 < value < math.inf:
                raise ConfigError(f"--{key}: {value:g} must be a number above 0")
            own[key] = value * scale
    if node is not None:
        if node < 1:
            raise ConfigError(f"--node-gpus {node}: a node has 1 GPU or more")
        own["node"] = node
    return replace(machine, **own)  # type: ignore[arg-type]
