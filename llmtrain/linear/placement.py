"""Where the weight of a linear layer lies, and which collective that calls for."""

from __future__ import annotations

from enum import Enum


class Placement(Enum):
    """Layout of a linear layer's weight within its tensor-parallel group.

    REPLICATED: every rank of the group holds the whole weight and computes on whole inputs; no
    collective in forward or backward. Data-parallel sharding (FSDP2) is not a placement: it
    gathers the weight before the layer runs, so the layer still sees all of it.
    """

    REPLICATED = "replicated"
