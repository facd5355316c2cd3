"""4-bit post-training quantization of convolutional networks."""

from ptq4cuda import (
    _starting,  # noqa: F401  # first, for Ctrl-C while the rest is imported
    ops,
)
from ptq4cuda._version import __version__
from ptq4cuda.artifact.file import load, save
from ptq4cuda.artifact.report import report
from ptq4cuda.bench.network import benchmark
from ptq4cuda.config import QuantConfig
from ptq4cuda.execute.lowering import lower_layers
from ptq4cuda.execute.program import program
from ptq4cuda.execute.saturation import saturation
from ptq4cuda.export.onnx_file import export_onnx
from ptq4cuda.nn import QuantConv1d, QuantConv2d, QuantConvTranspose1d, QuantConvTranspose2d, QuantLinear
from ptq4cuda.pipeline import quantize
from ptq4cuda.quantizer import QuantParams

__all__ = [
    "QuantConfig",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantLinear",
    "QuantParams",
    "__version__",
    "benchmark",
    "export_onnx",
    "load",
    "lower_layers",
    "ops",
    "program",
    "quantize",
    "report",
    "saturation",
    "save",
]
