"""Fused token-merging ops on tensors: matching, merging, and the attention that merging needs."""

from . import cuda_ops, reference  # noqa: F401  (cuda_ops: what runs behind the ops on a GPU)
from .attention_op import attention, attention_column_sums, attention_with_lse
from .backends import BackendError, backends, use_backend
from .checks import effective_r
from .ops import (
    add_layer_norm,
    bipartite_match,
    key_metric,
    match_keys,
    merge,
    merge_add_layer_norm,
    unmerge,
)

__all__ = [
    "BackendError",
    "add_layer_norm",
    "attention",
    "attention_column_sums",
    "attention_with_lse",
    "backends",
    "bipartite_match",
    "effective_r",
    "key_metric",
    "match_keys",
    "merge",
    "merge_add_layer_norm",
    "reference",
    "unmerge",
    "use_backend",
]
