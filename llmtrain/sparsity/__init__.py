"""Sparse hidden layers: one kind of mask, how it is chosen, where it applies, how it is stored.

``Granularity`` says what is kept together, ``sparse_layers`` which layers a config makes sparse,
``Masks`` holds the masks of this rank's layers under any layout. The products are those of
``llmtrain.linear.MaskedMatmul``; the methods that use and change masks are hooks in
``llmtrain.methods``.
"""

from llmtrain.linear import Mask
from llmtrain.sparsity.auto import SMALLEST_SPARSE, pick_products
from llmtrain.sparsity.bits import pack_bits, unpack_bits
from llmtrain.sparsity.case import Case, Choice, cases_of, choice_lines
from llmtrain.sparsity.choose import (
    best_kept,
    block_scores,
    block_sums,
    largest,
    prune_again,
    random_kept,
    random_keys,
)
from llmtrain.sparsity.granularity import Granularity, parse_granularity
from llmtrain.sparsity.masks import Masks, zero_outside
from llmtrain.sparsity.on_gpu import kinds_of
from llmtrain.sparsity.product_text import always_dense, product_lines
from llmtrain.sparsity.schedule import (
    Timetable,
    cubic_density,
    density_of_step,
    sparsity_lines,
    training_flops,
)
from llmtrain.sparsity.select import Sparse, check_cuts, mean_density, packed_dim, sparse_layers
from llmtrain.sparsity.storing import why_dense

__all__ = [
    "SMALLEST_SPARSE",
    "Case",
    "Choice",
    "Granularity",
    "Mask",
    "Masks",
    "Sparse",
    "Timetable",
    "always_dense",
    "best_kept",
    "block_scores",
    "block_sums",
    "cases_of",
    "check_cuts",
    "choice_lines",
    "cubic_density",
    "density_of_step",
    "kinds_of",
    "largest",
    "mean_density",
    "pack_bits",
    "packed_dim",
    "parse_granularity",
    "pick_products",
    "product_lines",
    "prune_again",
    "random_kept",
    "random_keys",
    "sparse_layers",
    "sparsity_lines",
    "training_flops",
    "unpack_bits",
    "why_dense",
    "zero_outside",
]
