"""torch.fx passes: trace into canonical form, fold BatchNorm, find what to quantize and how tensors come about."""

from ptq4cuda.graph.bind import bind
from ptq4cuda.graph.copying import buffers_kept, copy_model, hooks_of
from ptq4cuda.graph.ends import ends_of
from ptq4cuda.graph.fold import fold_batch_norm
from ptq4cuda.graph.layers import (
    activation_of,
    call_name,
    hidden_modules,
    is_addition,
    is_transparent,
    is_weighted,
    layer_spec,
    leave,
    module_activation,
    quantized_spec,
    why_float,
    why_float_call,
    why_left,
)
from ptq4cuda.graph.order import prepare, shortcuts_first
from ptq4cuda.graph.readers import readers
from ptq4cuda.graph.residual import operands_as_codes
from ptq4cuda.graph.trace import output_of, own_copy, trace, why_different
from ptq4cuda.graph.wrappers import is_compiled, unwrap

__all__ = [
    "activation_of",
    "bind",
    "buffers_kept",
    "call_name",
    "copy_model",
    "ends_of",
    "fold_batch_norm",
    "hidden_modules",
    "hooks_of",
    "is_addition",
    "is_compiled",
    "is_transparent",
    "is_weighted",
    "layer_spec",
    "leave",
    "module_activation",
    "operands_as_codes",
    "output_of",
    "own_copy",
    "prepare",
    "quantized_spec",
    "readers",
    "shortcuts_first",
    "trace",
    "unwrap",
    "why_different",
    "why_float",
    "why_float_call",
    "why_left",
]
