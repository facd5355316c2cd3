"""What was done to a network, layer by layer: it travels with the network and its file, and report() prints it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from ptq4cuda.config import QuantConfig
from ptq4cuda.graph.network import Network, stay_in_evaluation


@dataclass(frozen=True)
class Histogram:
    """Where values lie in the range of the quantizer of their channel.

    Zeros are apart: every quantizer represents them exactly, and behind a ReLU they would be half of all values.

    Attributes:
        counts: of 1,000 values that are not zero, how many are in each of 48 bins: 32 of the same width within the
            range, which reaches half a step beyond the first and the last code, and 8 on either side of it; what lies
            further out is in the outermost ones.
        low, high: the least and the greatest value that there is a code for, of all channels. Of weights, times the
            scales of their inputs where these are folded into them.
        clipped: percent of all values that are outside of the range.
        zeros: percent of all values.
    """

    counts: list[int]
    low: float
    high: float
    clipped: float
    zeros: float


@dataclass
class LayerRecord:
    """One layer with weights.

    Attributes:
        name: of the module, or of the graph node of a functional call.
        kind: class of the float layer.
        weight_bits: mean over output channels, None where the layer stayed in float.
        activation_bits: mean over input channels, None where the layer stayed in float.
        clip: the clip rule of the input.
        sqnr: of the output on the calibration data, in dB, with all layers before it quantized.
        own_sqnr: what the quantization of its weights and its input alone leaves: of the output, in dB, beside that
            of the float layer for the same input, on some of the calibration data.
        input_histogram, weight_histogram: of its input, as quantized so far, on some of the calibration data, and of
            its weights.
        float_bytes: weights and bias in float32.
        bytes: all stored tensors of the layer.
        execution: "integer", "simulate" or "float".
        reason: why it stayed in float, or a remark.
        weight_damage: noise over signal at the network's outputs, summed over these, that the quantized weights make
            alone. It is measured, on some of the calibration data, where layers share out bits or are raised to more.
        input_damage: the same of the quantized input; layers that share its quantizer have equal parts of it.
    """

    name: str
    kind: str
    weight_bits: float | None = None
    activation_bits: float | None = None
    clip: str = ""
    sqnr: float | None = None
    float_bytes: int = 0
    bytes: int = 0
    execution: str = "float"
    reason: str = ""
    weight_damage: float | None = None
    input_damage: float | None = None
    own_sqnr: float | None = None
    input_histogram: Histogram | None = None
    weight_histogram: Histogram | None = None


@dataclass(frozen=True)
class Trade:
    """A network that was tried while layers were raised to more bits.

    Attributes:
        raised: names of the layers.
        sqnr: of the network's output on the calibration data, in dB.
        bytes: of the quantized network.
        bits: that weights and inputs of these layers got, as in overrides.
        least_sqnr: see QuantRecord.
        value: the user's measure of it, where there is one.
        bit_operations: products of a sample, each times the bits of both factors.
    """

    raised: tuple[str, ...]
    sqnr: float | None
    bytes: int
    bits: dict[str, dict[str, int]] = field(default_factory=dict)
    least_sqnr: float | None = None
    value: float | None = None
    bit_operations: int = 0


@dataclass(frozen=True)
class OutputRecord:
    """One of several outputs.

    Attributes:
        name: by keys, positions and attributes in what the network returns.
        sqnr: on the calibration data, in dB.
        median_sqnr: the same of the median sample, where it has one item for each.
    """

    name: str
    sqnr: float | None
    median_sqnr: float | None


@dataclass
class QuantRecord:
    """A quantized network.

    Attributes:
        config: how it was quantized.
        layers: in order of execution.
        images: calibration samples that layers were fitted to.
        held_out: other ones, of which the SQNR is that of the network; 0: it is of those that were fitted to.
        seconds: that quantization took.
        walked_by: "graph", or "modules" where torch.fx could not trace the model.
        reason: why it was walked by its modules.
        sqnr: of the network's output on the calibration data, in dB.
        median_sqnr: the same of the median sample.
        worst_sqnr: the same of the worst sample.
        least_sqnr: the least of all outputs, each with the lower of its SQNR and that of its median sample.
        outputs: the network's, where there are several.
        folded: number of BatchNorms folded.
        float_bytes: of all parameters and buffers of the float model.
        bytes: of all parameters and buffers of the quantized one.
        frontier_bytes: most bytes of tensors between layers that were held on the host at a time.
        spilled_bytes: bytes of such tensors that went to files.
        constants: arguments of the model's forward that the network expects to have these values; None in files of
            old, which have those with defaults where needed.
        structure: what the network computes, line by line, before it is lowered to integers.
        trade: the networks that were tried, from the one as configured to this one, where layers were to be raised.
        tried: how many networks were tried, those with more bits among them.
        float_value: the user's measure of the float model, where there is one.
        max_drop: how far that of this network may be below it.
        shortfall: what was asked for and is not reached.
        few_samples: which layers have more inputs than the calibration samples can tell apart.
        left_out: which steps were left out, as other samples than those that were fitted to say.
    """

    config: QuantConfig
    layers: list[LayerRecord] = field(default_factory=list)
    images: int = 0
    held_out: int = 0
    seconds: float = 0.0
    walked_by: str = "graph"
    reason: str = ""
    sqnr: float | None = None
    median_sqnr: float | None = None
    worst_sqnr: float | None = None
    least_sqnr: float | None = None
    outputs: list[OutputRecord] = field(default_factory=list)
    folded: int = 0
    float_bytes: int = 0
    bytes: int = 0
    trade: list[Trade] = field(default_factory=list)
    tried: int = 0
    float_value: float | None = None
    max_drop: float | None = None
    shortfall: str = ""
    few_samples: str = ""
    left_out: str = ""
    frontier_bytes: int = 0
    spilled_bytes: int = 0
    structure: list[str] = field(default_factory=list)
    constants: dict[str, Any] | None = None

    @property
    def noise_at_outputs(self) -> bool:
        """Whether it is known what the quantization of each layer does at the network's outputs."""
        return all(layer.weight_damage is not None for layer in self.layers if layer.execution != "float")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a file's header."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> QuantRecord:
        """Return the record that to_dict described.

        Raises:
            LaterVersionError: a later version wrote them.
            TypeError, ValueError, KeyError: the fields do not describe one.
        """
        fields = {name: value for name, value in fields.items() if name != "trial"}  # times, in earlier files
        if fields.get("constants"):  # a file's header holds lists
            fields["constants"] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["constants"].items()}
        fields["config"] = QuantConfig.from_dict(fields["config"])
        fields["layers"] = [_layer(layer) for layer in fields["layers"]]
        fields["outputs"] = [_made(OutputRecord, output) for output in fields.get("outputs", [])]
        fields["trade"] = [_made(Trade, {**step, "raised": tuple(step["raised"])}) for step in fields["trade"]]
        return _made(cls, fields)


def _layer(fields: dict[str, Any]) -> LayerRecord:
    fields = {name: value for name, value in fields.items() if name != "damage"}  # of earlier files
    for name in ("input_histogram", "weight_histogram"):
        if fields.get(name) is not None:
            fields[name] = _made(Histogram, fields[name])
    return _made(LayerRecord, fields)


_T = TypeVar("_T")


def _made(cls: type[_T], fields: dict[str, Any]) -> _T:
    """Make a dataclass of fields, whose values must be of the types that it declares."""
    for name, declared in get_type_hints(cls).items():
        if name in fields and not _is_of(fields[name], declared):
            raise TypeError(f"{name} is {str(fields[name])[:40]!r}")
    return cls(**fields)


def _is_of(value: Any, declared: Any) -> bool:
    if get_origin(declared) is dict:
        return isinstance(value, dict)
    arguments = get_args(declared)
    if get_origin(declared) in (list, tuple):
        return isinstance(value, get_origin(declared)) and all(_is_of(v, arguments[0]) for v in value)
    if declared is int:
        return type(value) is int and 0 <= value < 1 << 63
    if arguments:
        return any(_is_of(value, one) for one in arguments)
    return isinstance(value, (int, float) if declared is float else declared) and type(value) is not bool


# torch.fx keeps `meta` when a GraphModule is copied; other modules keep every attribute, and may have one called so.
_KEY = "ptq4cuda"
_OTHER = "ptq4cuda_meta"


def attach_record(network: nn.Module, record: QuantRecord) -> None:
    """Let a record travel with a network, which stays in evaluation mode from now on."""
    free = not hasattr(network, "meta") or isinstance(vars(network).get("meta"), dict)
    place = "meta" if free else _OTHER
    vars(network).setdefault(place, {})[_KEY] = record
    if not isinstance(network, Network):
        vars(network)["train"] = partial(stay_in_evaluation, network)


def record_of(network: nn.Module) -> QuantRecord:
    """Return the record of a network.

    Raises:
        TypeError: the network was not made by ptq4cuda.quantize or ptq4cuda.load.
    """
    record = _record(network)
    if record is None:
        raise TypeError(f"{type(network).__name__} was not made by ptq4cuda.quantize or ptq4cuda.load")
    return record


def has_record(network: nn.Module) -> bool:
    """Tell whether a network was made by ptq4cuda.quantize or ptq4cuda.load."""
    return _record(network) is not None


def _record(network: nn.Module) -> QuantRecord | None:
    for place in ("meta", _OTHER):
        meta = getattr(network, place, None)
        record = meta.get(_KEY) if isinstance(meta, dict) else None
        if isinstance(record, QuantRecord):
            return record
    return None


def tensor_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters and buffers that a state_dict holds."""
    tensors = (t for t in module.state_dict().values() if isinstance(t, Tensor))  # beside extra state of any kind
    return sum(t.numel() * t.element_size() for t in tensors)
