"""Drop-in modules that hold really packed weights."""

from ptq4cuda.nn.conv import QuantConv2d
from ptq4cuda.nn.linear import QuantLinear
from ptq4cuda.nn.quant_module import QuantModule
from ptq4cuda.nn.quant_tensor import Quantize, QuantTensor

__all__ = ["QuantConv2d", "QuantLinear", "QuantModule", "QuantTensor", "Quantize", "quant_module_for"]

_QUANTIZED: dict[str, type[QuantConv2d | QuantLinear]] = {
    QuantConv2d.kind: QuantConv2d,
    QuantLinear.kind: QuantLinear,
}


def quant_module_for(kind: str) -> type[QuantConv2d | QuantLinear]:
    """Return the class that takes the place of torch.nn's class of this name."""
    return _QUANTIZED[kind]
