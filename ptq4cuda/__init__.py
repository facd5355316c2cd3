"""4-bit post-training quantization of convolutional networks."""

from ptq4cuda import ops
from ptq4cuda._version import __version__
from ptq4cuda.config import QuantConfig
from ptq4cuda.graph.lower import lower_layers
from ptq4cuda.nn import QuantConv2d, QuantLinear
from ptq4cuda.quantize import quantize
from ptq4cuda.quantizer import QuantParams
from ptq4cuda.report import report
from ptq4cuda.serialization import load, save

__all__ = [
    "QuantConfig",
    "QuantConv2d",
    "QuantLinear",
    "QuantParams",
    "__version__",
    "load",
    "lower_layers",
    "ops",
    "quantize",
    "report",
    "save",
]
