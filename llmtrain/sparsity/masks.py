"""The masks of this rank's layers: made, installed, changed, saved, under any layout.

A rank holds the mask of its tensor-parallel part of each layer, whatever FSDP2 makes of the
weight: that is what the products see. Weights and optimizer moments are zero outside it, in every
shard. A mask that follows scores is made from the whole weight, gathered a layer at a time, so
that every rank comes to the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from llmtrain.errors import ConfigError
from llmtrain.linear import Mask, MaskedMatmul, Placement
from llmtrain.model import hidden_layers
from llmtrain.parallel import Layout, local_boxes, whole
from llmtrain.sparsity.auto import pick_products
from llmtrain.sparsity.bits import pack_bits, unpack_bits
from llmtrain.sparsity.case import Case, Choice, case_of, choice_lines, semi_of_mask
from llmtrain.sparsity.choose import best_kept, block_scores, prune_again, random_kept
from llmtrain.sparsity.on_gpu import kinds_of
from llmtrain.sparsity.select import Sparse, packed_dim

Box = tuple[tuple[int, int], tuple[int, int]]


@torch.no_grad()
def zero_outside(mask: Mask, values: Tensor, corner: tuple[int, int] = (0, 0)) -> None:
    """+0.0 outside a mask in what this rank has of a matrix [out, in], in place.

    corner: place of the mask's first value in the whole matrix.
    """
    for local, (top, left) in local_boxes(values.detach()):
        if local.numel() == 0:
            continue
        rows, columns = local.shape
        own = mask.box((top - corner[0], left - corner[1]), (rows, columns))
        local.masked_fill_(~own.to(local.device), 0)


class Masks:
    """Masks of the layers ``sparse`` (of the whole model) that this rank has.

    model: the decoder, or this rank's stages. params: parameters by global name. double: layers
    have a second mask for backward. What tensor parallelism cannot split: ``check_cuts``.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        layout: Layout,
        sparse: Mapping[str, Sparse],
        double: bool = False,
    ) -> None:
        self.layout, self.double = layout, double
        self.device = layout.world.device
        self.layers = {n: layer for n, layer in hidden_layers(model) if n in sparse}
        self.sparse = {name: sparse[name] for name in self.layers}
        self.params = {name: params[f"{name}.weight"] for name in self.layers}
        self.kept: dict[str, Tensor] = {}
        # Of whole layers, for methods that train them.
        self.scored: dict[str, Tensor] = {}
        # "auto", "sparse" or "dense", see ``sparsity.products``; what was chosen, and for what.
        self.products = "dense"
        self.cases: dict[str, Case] = {}
        self.choices: dict[Case, Choice] = {}
        self._bits: dict[str, Tensor] = {}
        self._boxes = {name: self._own_box(name) for name in self.layers}

    def _own_box(self, name: str) -> Box:
        """Offset and size of this rank's tensor-parallel part of a weight."""
        layer, sparse = self.layers[name], self.sparse[name]
        tensor = self.layout.tensor
        offset, size = [0, 0], list(sparse.shape)
        if tensor is None or layer.placement is Placement.REPLICATED:
            return (0, 0), sparse.shape
        dim = 0 if layer.placement is Placement.COLUMN else 1
        size[dim] //= tensor.size
        offset[dim] = tensor.rank * size[dim]
        return (offset[0], offset[1]), (size[0], size[1])

    def draw(self, seed: int) -> None:
        """Random masks; each rank draws the rows of blocks of its own part."""
        for name, sparse in self.sparse.items():
            (top, left), (height, width) = self._boxes[name]
            high, wide = sparse.granularity.block
            rows = (top // high, -(-(top + height) // high))
            kept = random_kept(sparse.granularity, sparse.density, sparse.shape, (seed, name), rows)
            columns = slice(left // wide, -(-(left + width) // wide))
            self.kept[name] = kept[:, columns].contiguous().to(self.device)

    def choose_largest(self) -> None:
        """Masks of the largest magnitudes of the weights as they are."""
        for name, sparse in self.sparse.items():
            scores = self.scores(name, self.params[name])
            self.take_whole(name, best_kept(sparse.granularity, scores, sparse.density))

    def keep_all(self) -> None:
        """Masks that prune nothing."""
        for name, sparse in self.sparse.items():
            whole = torch.ones(sparse.granularity.grid(sparse.shape), dtype=torch.bool)
            self.take_whole(name, whole)

    def scores(self, name: str, values: Tensor) -> Tensor:
        """Block scores of a tensor like a layer's weight, on every rank. Collective."""
        return block_scores(whole(values), self.sparse[name].granularity.block)

    def whole(self, name: str) -> Tensor:
        """The mask of a whole layer, on every rank. Collective."""
        bits = self._stored(name, self.kept[name])
        dim = packed_dim(name)
        grid = self.sparse[name].granularity.grid(self.sparse[name].shape)
        return unpack_bits(whole(bits), grid[dim], dim)

    def take_whole(self, name: str, kept: Tensor) -> None:
        """The mask of a whole layer becomes this rank's, which keeps its part. The layer and the
        weights are not touched, see ``install``."""
        sparse, (offset, size) = self.sparse[name], self._boxes[name]
        mask = Mask(kept, sparse.granularity.block, sparse.shape)
        self.kept[name] = mask.part(offset, size).kept.to(self.device)

    def install(self, seed: int = 0, names: Iterable[str] | None = None) -> None:
        """Let layers compute with their masks. seed: of the second pruning, where ``double``."""
        names = list(self.layers if names is None else names)
        backs = {name: self._second(name, seed) if self.double else None for name in names}
        self._choose(names, backs)
        for name in names:
            sparse, kind = self._product(name)
            self.layers[name].set_mask(self.mask(name), backs[name], sparse=sparse, kind=kind)

    def _product(self, name: str) -> tuple[bool, str]:
        """Whether a layer gets sparse products, and which of a GPU's. Raises ConfigError where they
        were asked for by name and its mask has none."""
        wanted = self.products == "sparse"
        if name not in self.cases:
            return wanted, ""
        chosen = self.choices[self.cases[name]]
        if not wanted or not chosen.reason:
            return wanted or chosen.faster, chosen.kind
        kinds, reason = kinds_of(self.cases[name], self.device)
        if not kinds:
            raise ConfigError(f"sparsity.products: sparse: {name}: {reason}; use auto")
        return True, kinds[0]

    def lines(self) -> list[str]:
        """What was chosen, in words; nothing where there was no choice."""
        return choice_lines(self.cases, self.choices) if self.products == "auto" else []

    def _choose(self, names: Iterable[str], backs: Mapping[str, Mask | None]) -> None:
        """Decide where sparse products are faster, if asked to, and on a GPU by which ones.
        Collective."""
        on_cpu = self.device.type == "cpu"
        if self.products == "dense" or (on_cpu and (self.double or self.products == "sparse")):
            return
        for name in names:
            kept, matmul = self.kept[name], self.layers[name].matmul
            if (matmul.inner if isinstance(matmul, MaskedMatmul) else matmul).packs:
                continue  # FP8 and the like are always dense
            density = float(kept.double().mean()) if kept.numel() else 1.0
            granularity = self.sparse[name].granularity
            case = case_of(self._boxes[name][1], granularity, density, matmul.dtype)
            if not on_cpu and granularity.block == (1, 1):
                back = backs[name]
                second = None if back is None else back.kept
                case = case.with_semi(semi_of_mask(kept, second))
            self.cases[name] = case
        new = set(self.cases.values()) - self.choices.keys()
        gpu = None if on_cpu else self.device
        self.choices |= pick_products(new, self.layout.world.cpu_group, gpu)

    def mask(self, name: str) -> Mask:
        """The mask of this rank's part of a layer."""
        return Mask(self.kept[name], self.sparse[name].granularity.block, self._boxes[name][1])

    def _second(self, name: str, seed: int) -> Mask:
        (top, left), (height, width) = self._boxes[name]
        sparse = self.sparse[name]
        label = (seed, name)
        columns = (sparse.shape[1], left)
        kept = prune_again(sparse.granularity, self.kept[name], label, top, columns)
        return Mask(kept, (1, 1), (height, width))

    def remove(self) -> None:
        """Dense layers again; what was pruned stays zero until it learns."""
        self.want_dense_gradients(False)
        for layer in self.layers.values():
            layer.set_mask(None)

    def want_dense_gradients(self, wanted: bool) -> None:
        """Whether weight gradients are whole or zero outside the masks."""
        for layer in self.layers.values():
            layer.want_dense_gradients(wanted)

    def zero_outside(self, name: str, values: Tensor) -> None:
        """+0.0 outside the mask in a tensor like a layer's weight, in place, in every shard."""
        zero_outside(self.mask(name), values, self._boxes[name][0])

    @torch.no_grad()
    def add_outside(self, name: str, into: Tensor, values: Tensor, factor: float) -> None:
        """into += factor values outside the mask, in place; both like a layer's weight."""
        (top, left), _ = self._boxes[name]
        mask = self.mask(name)
        parts = zip(local_boxes(into.detach()), local_boxes(values.detach()), strict=True)
        for (target, offset), (source, _) in parts:
            if target.numel() == 0:
                continue
            rows, columns = target.shape
            own = mask.box((offset[0] - top, offset[1] - left), (rows, columns))
            target.add_(source.masked_fill(own, 0), alpha=factor)

    def zero_state(self, optimizer: torch.optim.Optimizer, names: Iterable[str]) -> None:
        """Weights and moments outside the masks become zero."""
        for name in names:
            param = self.params[name]
            if self.layers[name].compact is not None:
                continue
            self.zero_outside(name, param)
            for value in optimizer.state.get(param, {}).values():
                if isinstance(value, Tensor) and value.shape == param.shape:
                    self.zero_outside(name, value)

    def density(self, name: str) -> float:
        """Kept share of this rank's part of a layer."""
        return self.mask(name).density

    def _stored(self, name: str, kept: Tensor | None) -> Tensor:
        """The bits of a layer's mask as a checkpoint holds them; None: room for them."""
        sparse, dim = self.sparse[name], packed_dim(name)
        grid = list(sparse.granularity.grid(sparse.shape))
        size = list(self._boxes[name][1])
        own = [-(-n // b) for n, b in zip(size, sparse.granularity.block, strict=True)]
        grid[dim], own[dim] = -(-grid[dim] // 8), -(-own[dim] // 8)
        if kept is None:
            bits = torch.zeros(own, dtype=torch.uint8, device=self.device)
        else:
            bits = pack_bits(kept, dim)
        if self.layout.tensor is None:
            return bits
        assert self.layout.state is not None
        mesh = self.layout.state["tensor"]
        split = self.layers[name].placement is not Placement.REPLICATED
        shard, stride = [Shard(1 - dim) if split else Replicate()], (grid[1], 1)
        shape = torch.Size(grid)
        return DTensor.from_local(bits, mesh, shard, run_check=False, shape=shape, stride=stride)

    def bits(self) -> dict[str, Tensor]:
        """The masks by layer for a checkpoint, eight blocks in a byte; see ``bits``."""
        return {name: self._stored(name, self.kept[name]) for name in self.layers}

    def room(self) -> dict[str, Tensor]:
        """What a checkpoint's bits are read into, before ``take_room``."""
        self._bits = {name: self._stored(name, None) for name in self.layers}
        return self._bits

    def take_room(self) -> None:
        """Take over the masks that were read into ``room``."""
        for name, bits in self._bits.items():
            dim = packed_dim(name)
            size = self._boxes[name][1][dim]
            blocks = -(-size // self.sparse[name].granularity.block[dim])
            own = bits.to_local() if isinstance(bits, DTensor) else bits
            self.kept[name] = unpack_bits(own, blocks, dim)
        self._bits = {}
