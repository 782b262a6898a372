"""Triton kernels of every op, for NVIDIA GPUs from compute capability 8.0.

One file a subject, each with its formulas, bytes and layouts at the top. The functions have the
names and signatures of the ops in ``torch.ops.fastast`` and are what runs behind them on a CUDA
device. Imported when first used: this needs triton.
"""

from .attention import attention, attention_column_sums
from .attention_backward import attention_backward
from .layer_norm import (
    add_layer_norm,
    add_layer_norm_backward,
    merge_add_layer_norm_backward,
)
from .match import (
    bipartite_match,
    bipartite_match_sources,
    key_metric,
    match_keys,
    match_keys_sources,
)
from .merge import merge, merge_add_layer_norm, merge_backward, unmerge, unmerge_backward

__all__ = [
    "add_layer_norm",
    "add_layer_norm_backward",
    "attention",
    "attention_backward",
    "attention_column_sums",
    "bipartite_match",
    "bipartite_match_sources",
    "key_metric",
    "match_keys",
    "match_keys_sources",
    "merge",
    "merge_add_layer_norm",
    "merge_add_layer_norm_backward",
    "merge_backward",
    "unmerge",
    "unmerge_backward",
]
