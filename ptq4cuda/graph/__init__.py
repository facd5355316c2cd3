"""torch.fx passes: trace a model, fold BatchNorm, find what to quantize and how tensors come about."""

from ptq4cuda.graph.fold import fold_batch_norm
from ptq4cuda.graph.importance import layer_importance, output_importance
from ptq4cuda.graph.layers import (
    activation_of,
    call_counts,
    functional_kind,
    is_addition,
    is_transparent,
    layer_kind,
    module_activation,
    why_float,
)
from ptq4cuda.graph.trace import trace, why_different, without_inplace

__all__ = [
    "activation_of",
    "call_counts",
    "fold_batch_norm",
    "functional_kind",
    "is_addition",
    "is_transparent",
    "layer_importance",
    "layer_kind",
    "module_activation",
    "output_importance",
    "trace",
    "why_different",
    "why_float",
    "without_inplace",
]
