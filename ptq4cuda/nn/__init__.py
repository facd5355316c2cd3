"""Drop-in modules that hold really packed weights, and the kinds of layers whose places they take."""

from torch import nn
from torch.nn import functional as F

from ptq4cuda.nn.conv import QuantConv2d
from ptq4cuda.nn.conv1d import QuantConv1d
from ptq4cuda.nn.conv_transpose import CONV_TRANSPOSE_3D, QuantConvTranspose1d, QuantConvTranspose2d
from ptq4cuda.nn.linear import QuantLinear
from ptq4cuda.nn.quant_module import QuantModule
from ptq4cuda.nn.quant_tensor import QuantTensor
from ptq4cuda.nn.spec import LayerSpec

__all__ = [
    "SPECS",
    "LayerSpec",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantLinear",
    "QuantModule",
    "QuantTensor",
    "quant_module_for",
    "spec_of",
]

SPECS: tuple[LayerSpec, ...] = (
    QuantConv2d.spec,
    QuantLinear.spec,
    QuantConv1d.spec,
    QuantConvTranspose2d.spec,
    QuantConvTranspose1d.spec,
    # These stay in float; a BatchNorm is folded into them.
    LayerSpec(nn.Conv3d, 3, F.conv3d),
    CONV_TRANSPOSE_3D,
)
_QUANTIZED = {spec.name: spec.quantized for spec in SPECS if spec.quantized is not None}


def spec_of(module: nn.Module) -> LayerSpec | None:
    """Return what kind of layer a float module is by its class, None for what is none."""
    return next((spec for spec in SPECS if isinstance(module, spec.float_class)), None)


def quant_module_for(kind: str) -> type[QuantModule]:
    """Return the class that takes the place of torch.nn's class of this name.

    Raises:
        KeyError: none does.
    """
    return _QUANTIZED[kind]
