"""What the quantized layers share: packed weights, the quantizer of the input, state.

A module computes, for every output channel o (design: executable form),

    y_o = scale_o * Σ (code + offset_o) · (q - z) + bias_o

over codes q of its input with zero point z. The scale s_c of an input channel cannot leave the sum over channels; it
is folded into the weights before they are quantized, so `scale` and `offset` describe weights w·s_c. A layer with
folded=False quantizes the weights as they are, as the paper does; with a scale per channel it can only be simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from ptq4cuda import ops
from ptq4cuda.nn.quant_tensor import QuantizerState, tensor_of_values
from ptq4cuda.nn.spec import LayerSpec
from ptq4cuda.quantizer import QuantizedWeight, QuantParams
from ptq4cuda.solve.correction import WEIGHT_CORRECTIONS, WeightCorrection, correct_bias
from ptq4cuda.solve.rounding import round_to_nearest

if TYPE_CHECKING:
    from typing_extensions import Self

_ROWS = ("weight_bits", "weight_scale", "weight_offset")
_ACTIVATION = ("activation_bits", "activation_scale", "activation_zero_point")


STATE_IS_REFUSED = (
    "a network in integers loads no state_dict: load it into the network that quantize(..., "
    'QuantConfig(execution="simulate")) makes, and call ptq4cuda.lower_layers on that'
)


class IntegerEngine(Protocol):
    """Computes a layer from the codes of its input; it is a module without a state of its own."""

    def __call__(self, x: Tensor) -> Any:
        """Return values, or the codes of the next layers."""

    def weight_codes(self, layer: QuantModule) -> Tensor:
        """Return the weights of its layer as codes uint8 [O, *kernel, C / groups]."""

    @property
    def kernel(self) -> str:
        """The kernel that computes the layer, for reports."""

    @property
    def plain(self) -> bool:
        """Whether it computes the layer alone, from codes to values: else it is a step of a whole network."""


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return the memory format that the convolution of x has in PyTorch: of a contiguous kernel, x's own."""
    channels_last = x.dim() == 4 and x.stride(1) == 1 and x.stride(3) >= x.shape[1]  # where C, H or W is one, too
    return torch.channels_last if channels_last else torch.contiguous_format


def input_scale_of_weights(scale: Tensor, weight_shape: torch.Size, groups: int) -> Tensor:
    """View the scale of each input channel ([C] or [1]) so that it broadcasts over weights [O, C / groups, ...]."""
    out_channels, per_group = weight_shape[0], weight_shape[1]
    if scale.numel() > 1 and groups > 1:
        scale = scale.view(groups, 1, per_group).expand(groups, out_channels // groups, per_group)
        scale = scale.reshape(out_channels, per_group)
    else:
        scale = scale.view(1, -1)
    return scale.reshape(*scale.shape, *(1,) * (len(weight_shape) - 2))


class QuantModule(QuantizerState):
    """A layer with packed integer weights and, unless it quantizes weights only, a quantizer for its input.

    Buffers:
        weight_packed: uint8, rows of codes [O, *kernel, C / groups] packed by ops.pack_codes.
        weight_bits: uint8 [O].
        weight_scale: float32 [O].
        weight_offset: float32 [O].
        bias: float32 [O] or None.
        activation_bits, activation_scale, activation_zero_point: QuantParams of the input, or None.

    Attributes:
        engine: what computes the layer in integers, from codes, and holds the weights; None where it is simulated. In
            a network whose graph was lowered it is called in the layer's place, and may do what follows the layer.
        dtype: of the weights in the float network, which follows .half() and the like.
    """

    spec: ClassVar[LayerSpec]  # the kind of layer that it takes the place of

    weight_packed: Tensor
    weight_bits: Tensor
    weight_scale: Tensor
    weight_offset: Tensor
    bias: Tensor | None
    activation_bits: Tensor | None
    activation_scale: Tensor | None
    activation_zero_point: Tensor | None
    _row_offsets: Tensor

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        groups: int,
        bias: bool,
        quantized_input: bool,
        folded: bool,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.engine: IntegerEngine | None = None
        self.dtype = torch.float32
        self.folded = folded
        self.weight_shape = torch.Size(weight_shape)
        self.groups = groups
        out_channels = weight_shape[0]
        with torch.device(device if device is not None else torch.get_default_device()):
            self._set_buffers(
                weight_packed=torch.zeros(0, dtype=torch.uint8),
                weight_bits=torch.zeros(out_channels, dtype=torch.uint8),
                weight_scale=torch.ones(out_channels, dtype=torch.float32),
                weight_offset=torch.zeros(out_channels, dtype=torch.float32),
                bias=torch.zeros(out_channels, dtype=torch.float32) if bias else None,
                activation_bits=torch.full((1,), 8, dtype=torch.uint8) if quantized_input else None,
                activation_scale=torch.ones(1, dtype=torch.float32) if quantized_input else None,
                activation_zero_point=torch.zeros(1, dtype=torch.int32) if quantized_input else None,
            )
        self._locate_rows()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, but for the weight."""
        if name == "weight":
            raise AttributeError("the weight of a quantized layer is packed, it cannot be set: quantize a layer anew")
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantModule:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_scale.device)).dtype
        super()._apply(fn, recurse)
        return self

    def _set_buffers(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def _locate_rows(self) -> None:
        offsets, total = ops.row_offsets(self.weight_bits, self._row_length)
        if total != self.weight_packed.numel():
            raise ValueError(f"weight_packed has {self.weight_packed.numel()} bytes, weight_bits ask for {total}")
        self.register_buffer("_row_offsets", offsets, persistent=False)

    def _check_weight(self) -> None:
        """Raise ValueError unless bits, scales, offsets and biases are such as quantized weights have."""
        ops.check_bits(self.weight_bits)
        for name in ("weight_scale", "weight_offset", "bias"):
            values = getattr(self, name)
            if values is not None and not bool(torch.isfinite(values).all()):
                raise ValueError(f"{name} contains NaN or Inf")
        if not bool((self.weight_scale > 0).all()):
            raise ValueError("weight_scale must be positive")

    @property
    def _row_length(self) -> int:
        return self.weight_shape[1:].numel()

    # --- from float ---------------------------------------------------------------------------------------

    @classmethod
    def like(cls, layer: Any, *, quantized_input: bool = True, folded: bool = True) -> Self:
        """Return a layer that computes as a float one does, on the same device, with weights zero."""
        raise NotImplementedError

    @classmethod
    def from_float(
        cls,
        layer: Any,
        activation: QuantParams | Tensor | None = None,
        *,
        weight_bits: int | Tensor = 4,
        activation_bits: int = 4,
        bias_correction: WeightCorrection = "mean",
        folded: bool = True,
    ) -> Self:
        """Quantize a trained layer.

        Args:
            layer: the float layer; it is not changed.
            activation: example inputs, in which a range is found for each channel (QuantParams.from_data); or the
                quantizer of the input, per tensor or per channel; None leaves the input in float.
            weight_bits: 0 to 8, one number or uint8 [O].
            activation_bits: 1 to 8, for ranges that are found in example inputs.
            bias_correction: "none", "mean" or "mean+variance" (eq. 12-13).
            folded: fold the activation's scale into the weights before they are quantized.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind, shape or value.
        """
        if not isinstance(layer, cls.spec.float_class):
            raise TypeError(f"layer must be a torch.nn.{cls.spec.name}, got {type(layer).__name__}")
        quantized = cls.like(layer, quantized_input=activation is not None, folded=folded)
        if isinstance(activation, Tensor):
            quantized._refuse(activation)
            activation = QuantParams.from_data(activation, activation_bits, cls.spec.axis)
        quantized._quantize_from(layer, activation, weight_bits, bias_correction)
        return quantized

    def _quantize_from(
        self,
        layer: Any,
        activation: QuantParams | None,
        weight_bits: int | Tensor,
        bias_correction: WeightCorrection,
    ) -> None:
        """Take over a float layer's weights, rounded to the nearest code, its bias and a quantizer of its input."""
        if activation is not None and not isinstance(activation, QuantParams):
            raise TypeError(f"activation must be an input, QuantParams or None, got {type(activation).__name__}")
        if bias_correction not in WEIGHT_CORRECTIONS:
            raise ValueError(f"bias_correction must be one of {list(WEIGHT_CORRECTIONS)}, got {bias_correction!r}")
        if isinstance(weight_bits, int):
            if not 0 <= weight_bits <= 8:
                raise ValueError(f"bits must be 0 to 8, got {weight_bits}")
            weight_bits = torch.full_like(self.weight_bits, weight_bits)
        if not isinstance(weight_bits, Tensor):
            raise TypeError(f"weight_bits must be a number or a tensor, got {type(weight_bits).__name__}")
        if weight_bits.shape != self.weight_bits.shape:
            raise ValueError(
                f"weight_bits has shape {list(weight_bits.shape)}, expected {list(self.weight_bits.shape)}"
            )
        if activation is not None:
            self.set_activation(activation)
        weight = self.weight_to_quantize(self.spec.rows(layer))
        quantized = round_to_nearest(weight, weight_bits.to(weight.device))
        self.set_weight(correct_bias(quantized, weight, bias_correction), layer.bias)

    def weight_to_quantize(self, weight: Tensor) -> Tensor:
        """Return float32 weights in the order of the codes, times the scale of the input channels if it is folded.

        Args:
            weight: [O, C / groups, *kernel].

        Returns:
            [O, *kernel, C / groups].
        """
        if tuple(weight.shape) != tuple(self.weight_shape):
            raise ValueError(f"weight has shape {list(weight.shape)}, expected {list(self.weight_shape)}")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("weight contains NaN or Inf")
        weight = weight.float()
        if self.folded and self.activation_scale is not None:
            weight = weight * input_scale_of_weights(self.activation_scale, weight.shape, self.groups)
        return weight.movedim(1, -1).contiguous()

    def set_activation(self, activation: QuantParams) -> None:
        """Quantize the input with these parameters (before set_weight: their scale is folded into the weights)."""
        channels = self.weight_shape[1] * self.groups
        for name in ("bits", "scale", "zero_point"):
            length = getattr(activation, name).numel()
            if length not in (1, channels):
                raise ValueError(f"activation {name} has {length} channels, the layer has {channels}")
        self._set_buffers(
            activation_bits=activation.bits,
            activation_scale=activation.scale,
            activation_zero_point=activation.zero_point,
        )

    def set_weight(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        """Store quantized weights [O, *kernel, C / groups] packed, and the bias."""
        self._set_buffers(
            weight_packed=ops.pack_codes(weight.codes.flatten(1), weight.bits),
            weight_bits=weight.bits,
            weight_scale=weight.scale,
            weight_offset=weight.offset,
            bias=None if bias is None else bias.detach().float().clone(),
        )
        self._locate_rows()

    # --- in integers --------------------------------------------------------------------------------------

    def execute_in_integers(self, engine: IntegerEngine) -> None:
        """Leave the computation to an engine that was made of this layer; it holds the weights from now on."""
        self.engine = engine
        self.register_buffer("weight_packed", self.weight_packed[:0].clone(), persistent=False)

    def _refuse(self, x: object) -> None:
        """Raise, in one sentence, where an input is to blame for what failed.

        Raises:
            TypeError: it is no tensor of float32, float16 or bfloat16.
            RuntimeError: it has not the shape that the layer takes, as in torch.nn.
        """
        x = tensor_of_values(x)
        misfit = self._misfit(x)
        if misfit:
            raise RuntimeError(f"the input has the shape {list(x.shape)}, {misfit}")

    def _misfit(self, x: Tensor) -> str:
        """Return what is wrong with the shape of an input, or ""."""
        raise NotImplementedError

    def _integer_forward(self, x: Tensor, engine: IntegerEngine) -> Tensor:
        """Compute from values, which are quantized first."""
        assert self.activation_scale is not None and self.activation_zero_point is not None
        assert self.activation_bits is not None
        codes = ops.quantize(
            x, self.activation_scale, self.activation_zero_point, self.activation_bits, self.spec.axis
        )
        y: Tensor = engine(codes)
        return y.to(x.dtype)

    def _call(self, x: Tensor, product: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """Compute from values, in integers or in floating point; `product` as for _simulate."""
        try:
            if self.engine is None or not self.engine.plain:
                return self._simulate(x, product)
            if self.spec.is_single(x):  # images by themselves are never channels_last
                return self._integer_forward(x.unsqueeze(0), self.engine).squeeze(0).contiguous()
            y = self._integer_forward(x, self.engine)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            self._refuse(x)
            raise
        return y.contiguous(memory_format=memory_format_of(x)) if self.spec.dims else y

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.engine is not None:
            codes = self.quantized_weight().codes
            destination[prefix + "weight_packed"] = ops.pack_codes(codes.flatten(1), self.weight_bits)

    # --- in use -------------------------------------------------------------------------------------------

    @property
    def activation(self) -> QuantParams | None:
        """The quantizer of the input."""
        if self.activation_bits is None or self.activation_scale is None or self.activation_zero_point is None:
            return None
        return QuantParams(self.activation_bits, self.activation_scale, self.activation_zero_point, self.spec.axis)

    def quantized_weight(self) -> QuantizedWeight:
        """Return the unpacked weights, codes [O, *kernel, C / groups]."""
        if self.engine is not None:
            codes = self.engine.weight_codes(self)
        else:
            codes = ops.unpack_codes(self.weight_packed, self.weight_bits, self._row_length, self._row_offsets)
        shape = (self.weight_shape[0], *self.weight_shape[2:], self.weight_shape[1])
        return QuantizedWeight(codes.view(shape), self.weight_bits, self.weight_scale, self.weight_offset)

    def dequantized_weight(self) -> Tensor:
        """Return the float32 weights that the quantized layer computes with, in the order of the float layer's."""
        weight = self.quantized_weight().values().movedim(-1, 1)
        if self.folded and self.activation_scale is not None:
            weight = weight / input_scale_of_weights(self.activation_scale, self.weight_shape, self.groups)
        return self.spec.from_rows(weight, self.groups)

    @property
    def weight(self) -> Tensor:
        """The weights as the float layer has them, dequantized: a copy for code that asks about a layer's weights."""
        return self.dequantized_weight().to(self.dtype)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return the quantized input, in units of its codes (q - z) where the scale is folded into the weights."""
        return self._in_codes(x) if self.folded else self._fake_quantized(x)

    def _fake_quantized(self, x: Tensor) -> Tensor:
        if self.activation_scale is None or self.activation_zero_point is None or self.activation_bits is None:
            return x
        return ops.fake_quantize(
            x, self.activation_scale, self.activation_zero_point, self.activation_bits, self.spec.axis
        )

    def _in_codes(self, x: Tensor) -> Tensor:
        """Return q - z, whole numbers; a gradient passes as if they were not rounded."""
        if self.activation_scale is None:
            return x
        shape = [1] * x.dim()
        shape[self.spec.axis] = -1
        x = self._fake_quantized(x) / self.activation_scale.view(shape)
        return x + (x.detach().round() - x.detach()) if x.requires_grad else x.round_()

    @property
    def product_scale(self) -> Tensor | None:
        """What a product of q - z and code + offset is worth, float32 [O].

        None if the products of an output differ: the input has a scale per channel, not folded into the weights.
        """
        if self.folded or self.activation_scale is None:
            return self.weight_scale
        if self.activation_scale.numel() == 1:
            return self.weight_scale * self.activation_scale
        if self.weight_shape[1] > 1:
            return None
        return self.weight_scale * self.activation_scale.repeat_interleave(self.weight_shape[0] // self.groups)

    def _simulate(self, x: Tensor, product: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """Compute in floating point.

        Where products are all worth the same, they are summed in units of codes: float32 holds sums below 2^24
        exactly, whatever their order, and the result is that of integers, bit for bit.

        Args:
            x: values.
            product: of input, weights in the order of the float layer's, and bias.
        """
        if x.dtype not in ops.FLOATING:
            self._refuse(x)
        scale = self.product_scale
        if self.activation_scale is None or scale is None:
            weight = self.dequantized_weight().to(x.dtype)
            return product(self._fake_quantized(x), weight, None if self.bias is None else self.bias.to(x.dtype))
        quantized = self.quantized_weight()
        offset = quantized.offset.view(-1, *(1,) * (quantized.codes.dim() - 1))
        with torch.autocast(x.device.type, enabled=False):  # the sums leave float16
            weight = self.spec.from_rows((quantized.codes + offset).movedim(-1, 1), self.groups)
            y = product(self._in_codes(x.float()), weight, None)
        shape = [1] * y.dim()
        shape[self.spec.axis] = -1
        y = y * scale.view(shape)
        return (y if self.bias is None else y + self.bias.view(shape)).to(x.dtype)

    # --- state --------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept buffers of other lengths: they depend on the bits that were allocated."""
        errors: list[str] = args[-1]
        if self.engine is not None:
            raise RuntimeError(STATE_IS_REFUSED)
        before = len(errors)
        self._make_room(state_dict, prefix, errors, ("weight_packed", *_ACTIVATION), fixed=_ROWS)
        if self.bias is None and prefix + "bias" in state_dict:  # solvers give layers a bias that had none
            self.register_buffer("bias", torch.zeros_like(self.weight_scale))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if len(errors) > before:
            return
        try:
            self._check_weight()
            self._locate_rows()
            activation = self.activation
            if activation is not None:
                self.set_activation(activation)
        except (TypeError, ValueError) as error:
            errors.append(f"{prefix.rstrip('.')}: {error}")

    def extra_repr(self) -> str:
        """Describe bits and execution, as `print(module)` shows them."""
        weight = f"weight_bits={_mean_bits(self.weight_bits)}"
        if self.engine is not None:
            weight += ", in integers"
        if self.activation_bits is None:
            return weight
        return f"{weight}, activation_bits={_mean_bits(self.activation_bits)}"


def _mean_bits(bits: Tensor) -> str:
    if bits.is_meta or bits.numel() == 0:
        return "?"
    mean = bits.float().mean().item()
    return f"{mean:g}" if int(bits.min()) == int(bits.max()) else f"{mean:.2f} (mean)"
