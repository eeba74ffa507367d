"""What a mask keeps or prunes together.

===============  ==========================================================================
``unstructured``  single weights
``RxC``           blocks of R outputs by C inputs: 1x2, 4x4, 8x2, 16x16 ... 64x64
``N:M``           N of every M inputs of an output
``N:Mt``          N of every M inputs and N of every M outputs, in M x M tiles
                  (transposable: Hubara et al. 2021, 2102.08124)
===============  ==========================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmtrain.errors import ConfigError

_BLOCK, _NM = re.compile(r"([1-9]\d*)x([1-9]\d*)"), re.compile(r"([1-9]\d*):([1-9]\d*)(t?)")
# Larger transposable tiles are not searched for the best pattern: 90 of 2:4, far too many of 4:8.
LARGEST_TILE = 4
# How far the density of a layer may be from what was asked for, since blocks are whole.
NEAR = 0.01


@dataclass(frozen=True)
class Granularity:
    """block: what is kept as one. n, m: N of M inputs, where m is not 0; both: of outputs too."""

    text: str
    block: tuple[int, int] = (1, 1)
    n: int = 0
    m: int = 0
    both: bool = False

    @property
    def unit(self) -> tuple[int, int]:
        """Rows and columns that a cut through the matrix must not separate."""
        return (self.m if self.both else 1, self.m) if self.m else self.block

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the mask: blocks down and across."""
        return -(-shape[0] // self.block[0]), -(-shape[1] // self.block[1])

    def density(self, wanted: float | None, where: str) -> float:
        """The share that is kept. where: the key to name in a fault.

        Raises ConfigError where none is given, or one that N:M cannot meet.
        """
        if not self.m:
            if wanted is None:
                raise ConfigError(f"{where}: is missing; write the share of kept weights, 0.25 say")
            return wanted
        own = self.n / self.m
        if wanted is not None and wanted not in (own, 1.0):
            raise ConfigError(
                f"{where}: {wanted:g} cannot be met by {self.text}, whose density is {own:g}; "
                "leave it out, or choose another granularity"
            )
        return own if wanted is None else wanted

    def check_search(self, where: str) -> None:
        """Raise ConfigError where no mask can be chosen by magnitude. where: the key to name."""
        if self.both and self.m > LARGEST_TILE:
            raise ConfigError(
                f"{where}: {self.text} cannot be chosen by magnitude: transposable tiles are "
                f"searched up to {LARGEST_TILE} a side; take 2:4t or {self.text.removesuffix('t')}"
            )

    def check(
        self, shape: tuple[int, int], density: float, layer: str, double: bool = False
    ) -> None:
        """Raise ConfigError where a layer of ``shape`` (outputs, inputs) has no such mask.

        double: N:M is pruned to N of M outputs as well.
        """
        if self.m:
            outputs = self.both or double
            sizes = (("outputs", shape[0]),) * outputs + (("inputs", shape[1]),)
            for what, size in sizes:
                if size % self.m:
                    raise ConfigError(
                        f"sparsity.granularity: {self.text} does not divide the {size} {what} of "
                        f"{layer}; change the model's widths, or leave the layer out with "
                        f"sparsity.rules: [{{layers: [{layer}], density: 1}}]"
                    )
            return
        rows, columns = self.grid(shape)
        blocks = rows * columns
        met = round(density * blocks) / blocks
        if abs(met - density) > NEAR:
            raise ConfigError(
                f"sparsity.density: {density:g} cannot be met by the {blocks} blocks of "
                f"{self.text} that {layer} [{shape[0]}, {shape[1]}] has; {met:g} is nearest. Take "
                "smaller blocks"
            )


def parse_granularity(text: str, where: str = "sparsity.granularity") -> Granularity:
    """A granularity from its words. Raises ConfigError naming ``where``."""
    if text == "unstructured":
        return Granularity(text)
    if match := _BLOCK.fullmatch(text):
        return Granularity(text, (int(match[1]), int(match[2])))
    if (match := _NM.fullmatch(text)) and int(match[1]) < int(match[2]):
        return Granularity(text, n=int(match[1]), m=int(match[2]), both=bool(match[3]))
    raise ConfigError(
        f"{where}: {text!r} is no granularity; write unstructured, blocks such as 4x4, N of M "
        "such as 2:4, or 2:4t for both directions"
    )
