"""What people hand to quantize(): models with constants and wrappers, batches of every form."""

from __future__ import annotations

import copy
import math
import pickle
import sys
import threading
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import ptq4cuda
from ptq4cuda import QuantConfig, QuantConv2d, QuantLinear, quantize
from ptq4cuda.artifact.record import record_of
from ptq4cuda.calibrate.inputs import Inputs, constant_arguments
from ptq4cuda.containers import contents, tensors_of
from ptq4cuda.metrics import Noise
from ptq4cuda.processes import ALONE

EXECUTIONS = ["integer", "simulate"]


class Net(nn.Module):
    """A small network; `branches` keeps torch.fx from tracing it."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.bn, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 10)
        self.branches = branches
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and x.sum() < -1e9:
            x = -x
        x = F.relu(self.bn(self.first(x)))
        return self.head(F.relu(self.second(x)).mean((2, 3)))


@pytest.fixture(params=["graph", "modules"])
def walked_by(request: pytest.FixtureRequest) -> str:
    walk: str = request.param
    return walk


def sqnr(expected: Any, found: Any) -> float:
    noise = Noise()
    noise.add(expected, found)
    return math.inf if noise.sqnr is None else noise.sqnr


def check(
    model: nn.Module,
    batches: list[Any],
    call: Callable[[nn.Module], Any],
    walked_by: str,
    folder: Path,
    least: float = 20.0,
) -> None:
    """Quantize in both executions: close to float, the same from a file, bit for bit."""
    for execution in EXECUTIONS:
        config = QuantConfig.naive(8, 8, fold_activation_scale=True, execution=execution)
        network = quantize(model, batches, config, progress=False)
        assert record_of(network).walked_by == walked_by, record_of(network).reason
        with torch.no_grad():
            expected, found = call(model), call(network)
            assert sqnr(expected, found) > least
            ptq4cuda.save(network, folder / "net.ptq4")
            loaded = ptq4cuda.load(folder / "net.ptq4", model)
            assert sqnr(found, call(loaded)) == math.inf


# --- models ---------------------------------------------------------------------------------------------------


class Masked(Net):
    """Holds -inf on purpose, and returns it for the classes that are not there."""

    def __init__(self, branches: bool) -> None:
        super().__init__(branches)
        self.register_buffer("causal", torch.full((10, 10), -math.inf).triu(1))
        self.absent = nn.Parameter(torch.zeros(10).index_fill(0, torch.tensor([3, 7]), -math.inf), False)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return (torch.softmax(y[:, None] + self.causal, -1) * 10 + y[:, None]).sum(1) + self.absent


def test_constants_may_be_infinite(images: Tensor, walked_by: str, tmp_path: Path) -> None:
    model = Masked(walked_by == "modules")
    check(model, [images], lambda m: m(images[:8]), walked_by, tmp_path)
    assert record_of(quantize(model, [images], QuantConfig.naive(8, 8), progress=False)).sqnr > 20


class MaskedHead(Net):
    """Its last layer is followed by nothing but an infinite mask, which could be a bias."""

    def __init__(self, branches: bool) -> None:
        super().__init__(branches)
        self.register_buffer("absent", torch.zeros(10).index_fill(0, torch.tensor([3, 7]), -math.inf))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.absent


def test_infinite_masks_are_no_biases(images: Tensor, walked_by: str, tmp_path: Path) -> None:
    model = MaskedHead(walked_by == "modules")
    check(model, [images], lambda m: m(images[:8]), walked_by, tmp_path)
    network = quantize(model, [images], QuantConfig(weight_bits=8, activation_bits=8), progress=False)
    assert record_of(network).sqnr > 20
    assert bool(network(images).isneginf()[:, [3, 7]].all())


@pytest.mark.parametrize("name", ["first.weight", "first.bias", "bn.running_var", "bn.weight", "head.weight"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_layers_may_not(images: Tensor, name: str, value: float) -> None:
    model = Net()
    model.state_dict()[name].view(-1)[0] = value
    with pytest.raises(ValueError, match=f"the model's '{name}' contains NaN or Inf"):
        quantize(model, [images], progress=False)


def compiled_part(model: nn.Module) -> nn.Module:
    model.second = torch.compile(model.second, backend=never)
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend=never)
    return model


def never(*args: object) -> None:
    raise AssertionError("it is not compiled to be quantized")


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda m: torch.compile(m, backend=never),
    "compiled in place": compiled_in_place,
    "compiled in part": compiled_part,
    "parallel": nn.DataParallel,
    "compiled and parallel": lambda m: nn.DataParallel(torch.compile(m, backend=never)).eval(),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_models_are_quantized_from_the_original(
    images: Tensor, wrap: Callable[[nn.Module], nn.Module], walked_by: str, tmp_path: Path
) -> None:
    branches = walked_by == "modules"
    expected = quantize(Net(branches), [images], QuantConfig.fast(), progress=False)
    network = quantize(wrap(Net(branches)), [images], QuantConfig.fast(), progress=False)
    assert record_of(network).walked_by == walked_by
    assert network.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(network(images), expected(images))
    ptq4cuda.save(network, tmp_path / "net.ptq4")
    for model in (Net(branches), wrap(Net(branches))):
        assert torch.equal(ptq4cuda.load(tmp_path / "net.ptq4", model)(images), expected(images))


def test_scripted_parts_are_refused(images: Tensor) -> None:
    model = Net()
    model.second = torch.jit.trace(model.second, torch.zeros(1, 8, 10, 10))
    with pytest.raises(TypeError, match=r"the model's part 'second' is a torch\.jit\.ScriptModule: take the"):
        quantize(model, [images], QuantConfig.naive(8, 8), progress=False)


# --- arguments ------------------------------------------------------------------------------------------------


class Arguments(Net):
    """Takes what models take beside images."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        scale: float = 1.0,
        grid: Tensor | None = None,
        *,
        temperature: Any = 1.0,
        pair: Any = None,
    ) -> Tensor:
        if grid is not None:
            x = x + F.interpolate(grid[None], x.shape[-2:])
        y = super().forward(x) * scale / temperature
        return y if pair is None else y + pair["a"] + pair["b"][0]


def arguments(x: Tensor) -> dict[str, dict[str, Any]]:
    grid, temperature = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(2)), torch.tensor(2.0)
    return {
        "images alone": {"x": x},
        "a default is left out": {"x": x, "grid": grid},
        "keyword only": {"x": x, "temperature": temperature},
        "a number": {"x": x, "scale": 3},
        "none": {"x": x, "scale": 2.0, "grid": None},
        "no dimensions": {"grid": grid, "temperature": temperature, "x": x, "scale": torch.tensor(0.5)},
        "containers": {"x": x, "grid": grid, "pair": {"a": x.mean((1, 2, 3))[:, None], "b": [torch.ones(10), None]}},
    }


@pytest.mark.parametrize("name", arguments(torch.zeros(1, 3, 12, 12)))
def test_arguments_of_every_kind(
    images: Tensor, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A model that torch.fx traces or not, depending on the arguments; of a graph that fails nothing is printed."""
    model = Arguments()
    batches = [arguments(x)[name] for x in (images[:32], images[32:])]
    for execution in EXECUTIONS:
        config = QuantConfig.naive(8, 8, fold_activation_scale=True, execution=execution)
        network = quantize(model, batches, config, progress=False)
        given = arguments(images[:8])[name]
        with torch.no_grad():
            assert sqnr(model(**given), network(**given)) > 25
            ptq4cuda.save(network, tmp_path / "net.ptq4")
            loaded = ptq4cuda.load(tmp_path / "net.ptq4", model)
            assert torch.equal(loaded(**given), network(**given))
    assert capfd.readouterr().err == ""


def test_tensors_without_samples_may_differ_between_batches(images: Tensor) -> None:
    model = Arguments(branches=True)
    batches = [{"x": x, "grid": torch.rand(3, 4, 4)} for x in images.split(24)]
    network = quantize(model, batches, QuantConfig.naive(8, 8), progress=False)
    assert record_of(network).walked_by == "modules"
    with torch.no_grad():
        for batch in batches:
            assert sqnr(model(**batch), network(**batch)) > 25


def test_masks_that_are_added_may_be_infinite(images: Tensor, walked_by: str, tmp_path: Path) -> None:
    class Added(Net):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return torch.softmax(super().forward(x) + mask, -1)

    mask = torch.zeros(10).index_fill(0, torch.tensor([2]), -math.inf)
    model = Added(walked_by == "modules")
    check(model, [{"x": images, "mask": mask}], lambda m: m(images[:8], mask), walked_by, tmp_path)


def test_damage_is_measured_with_arguments_by_name(images: Tensor) -> None:
    batch = {"grid": torch.rand(3, 4, 4), "x": images}
    network = quantize(Arguments(), [batch], QuantConfig.fast(target_sqnr=25.0), progress=False)
    assert record_of(network).images == len(images)
    assert record_of(network).sqnr > 25


def test_subclasses_of_tensors_become_plain(images: Tensor) -> None:
    class Picture(Tensor):
        pass

    batches = [images[:24].as_subclass(Picture), nn.Parameter(images[24:])]
    network = quantize(Net(), batches, QuantConfig.fast(), progress=False)
    expected = quantize(Net(), [images[:24], images[24:]], QuantConfig.fast(), progress=False)
    assert all(type(t) is Tensor for t in network.state_dict().values())
    assert torch.equal(network(images), expected(images))


# --- what is refused ------------------------------------------------------------------------------------------


class Samples(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return torch.rand(3, 12, 12), 0


def single_images() -> Iterator[Any]:
    for _ in range(4):
        yield torch.rand(3, 12, 12), 1


PICTURE = Image.new("RGB", (12, 12))
REFUSED: dict[str, tuple[Any, str]] = {
    "array": (np.zeros((4, 3, 12, 12)), r"got one ndarray: torch\.from_numpy makes a tensor of it"),
    "arrays": ([np.zeros((4, 3, 12, 12))], r"batch 0 must be a tensor.*got ndarray: torch\.from_numpy"),
    "array in a dict": (
        [{"x": np.zeros((4, 3, 12, 12))}],
        "batch 0 has ndarray for the model's argument 'x'.*from_num",
    ),
    "pictures": ([PICTURE], "batch 0 must be a tensor.*got Image: make tensors of images.*and stack them"),
    "a list of pictures": ([[PICTURE, PICTURE]], "got Image: make tensors of images"),
    "a picture": (PICTURE, "got one Image: make tensors of images"),
    "path": ("images/", "got one str: read its images into tensors first, as .*ImageFolder and a DataLoader"),
    "Path": (Path("images"), "got one PosixPath: read its images into tensors first"),
    "paths": ([Path("a.png")], "batch 0 must be a tensor.*got PosixPath: read its images"),
    "dataset": (Samples(), r"got one Samples: its items are single samples; torch\.utils\.data\.DataLoader\(dataset"),
    "single samples": (single_images(), "the model fails on the first .*got 3D input.*four, as torch.stack makes it"),
    "uint8": (
        [torch.zeros(4, 3, 12, 12, dtype=torch.uint8)],
        r"the model fails .*samples are torch\.uint8 and the model.*give them as samples\.to\(torch\.float32\)$",
    ),
    "float64": (
        [torch.zeros(4, 3, 12, 12).double()],
        r"are torch\.float64 and the model is torch\.float32, give them as samples\.to\(torch\.float32\)$",
    ),
    "half": (
        [torch.zeros(4, 3, 12, 12).half()],
        r"are torch\.float16 and the model is torch\.float32, give it as model\.to\(torch\.float16\)$",
    ),
    "channels": ([torch.zeros(4, 1, 12, 12)], "the model fails on the first calibration batch .*to have 3 channels"),
    "images of detectors": ([[torch.rand(3, 12, 12)] * 4], "batch 0 is a list of images, as detectors take"),
    "two images": ([[torch.rand(3, 12, 12), torch.rand(3, 9, 9)]], "batch 0 is a list of images"),
    "with targets": ([([torch.rand(3, 12, 12)] * 2, [{}, {}])], "batch 0 is a list of images.*its backbone"),
    "images by name": (
        [{"x": [torch.rand(3, 12, 12)] * 2}],
        "none is a tensor for an argument of the model's forward",
    ),
    "sparse": ([torch.rand(4, 3, 12, 12).to_sparse()], r"batch 0 has a tensor that is torch\.sparse_coo: give dense"),
}


@pytest.mark.parametrize(("batches", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_batch_is_refused_with_the_remedy(batches: Any, message: str) -> None:
    several = list(batches) if isinstance(batches, Iterator) else None  # for both walks
    for branches in (False, True):
        with pytest.raises((TypeError, ValueError), match=message) as caught:
            quantize(Net(branches), batches if several is None else iter(several), progress=False)
        assert "put it in a list" not in str(caught.value)


# --- constants ------------------------------------------------------------------------------------------------


class Flags(Net):
    """Has arguments on which its code depends."""

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor | None = None, twice: bool = False, size: tuple[int, int] = (12, 12)
    ) -> Tensor:
        h, w = size
        x = F.interpolate(x, (h, w))
        y = super().forward(x)
        if twice:
            y = y * 2
        return y if mask is None else y + mask


@pytest.mark.parametrize(
    "given",
    [{}, {"twice": True}, {"twice": False, "mask": None}, {"mask": torch.ones(10)}, {"size": (9, 10), "twice": True}],
    ids=str,
)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_what_code_depends_on_is_constant(
    images: Tensor, given: dict[str, Any], execution: str, tmp_path: Path
) -> None:
    model = Flags()
    config = QuantConfig.naive(8, 8, fold_activation_scale=True, execution=execution)
    network = quantize(model, [{"x": x, **given} for x in images.split(24)], config, progress=False)
    record = record_of(network)
    assert (record.walked_by, record.folded > 0) == ("graph", True), record.reason
    ptq4cuda.save(network, tmp_path / "net.ptq4")
    loaded = ptq4cuda.load(tmp_path / "net.ptq4", model)
    assert record_of(loaded).constants == record.constants
    with torch.no_grad():
        expected = model(images, **given)
        for other in (network, loaded, copy.deepcopy(network)):
            assert sqnr(expected, other(images, **given)) > 30
            assert torch.equal(other(images, **given), network(images, **given))
            with pytest.raises(ValueError, match=r"was quantized with twice=(True|False), and is called with"):
                other(images, **{**given, "twice": not given.get("twice", False)})
            if given.get("twice"):
                with pytest.raises(ValueError, match="was quantized with twice=True, and is called with False"):
                    other(images)
            if "mask" not in given:
                with pytest.raises(ValueError, match="was quantized with mask=None, and is called with a Tensor"):
                    other(images, mask=torch.ones(10), **given)


# --- outputs --------------------------------------------------------------------------------------------------


class ModelOutput(OrderedDict[str, Any]):
    """As transformers have it: a dict whose items are attributes."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


@dataclass(frozen=True)
class Frozen:
    logits: Tensor
    size: int


@dataclass
class Derived:
    logits: Tensor
    doubled: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.doubled = self.logits * 2


class Pair(NamedTuple):
    logits: Tensor
    rest: Any


class Instances:
    """As detectors return them."""

    def __init__(self, size: tuple[int, int], **fields: Any) -> None:
        self.size, self.fields = size, fields

    @property
    def logits(self) -> Tensor:
        found: Tensor = self.fields["logits"]
        return found


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Items(list[Any]):
    pass


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda y: {"a": y, "b": [y, None]},
    "ordered": lambda y: OrderedDict(out=y, aux=y + 1),
    "default": lambda y: defaultdict(list, {"out": [y]}),
    "model output": lambda y: ModelOutput(logits=y, hidden=(y, y + 1)),
    "frozen": lambda y: Frozen(y, 3),
    "derived": Derived,
    "named": lambda y: Pair(y, Pair(y * 2, 1)),
    "instances": lambda y: Instances((3, 4), logits=y, more={"a": y}),
    "list": lambda y: Items([y, y + 1]),
    "nested": lambda y: [
        ModelOutput(a=Frozen(y, 1), b=OrderedDict(c=(Instances((1, 2), logits=y),))),
        {"x": Pair(y, 0)},
    ],
}


def shape_of(value: Any) -> Any:
    """Return the classes of a value and of what it holds, tensors aside."""
    held = contents(value)
    return value if isinstance(value, (int, type(None))) else (type(value), [shape_of(v) for v in held or ()])


@pytest.mark.parametrize("make", OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_keep_their_classes(
    images: Tensor, make: Callable[[Tensor], Any], walked_by: str, tmp_path: Path
) -> None:
    class Wraps(Net):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return make(super().forward(x))

    model = Wraps(walked_by == "modules")
    for execution in EXECUTIONS:
        config = QuantConfig.naive(8, 8, fold_activation_scale=True, execution=execution)
        network = quantize(model, [images], config, progress=False)
        record = record_of(network)
        assert record.walked_by == walked_by, record.reason
        ptq4cuda.save(network, tmp_path / "net.ptq4")
        with torch.no_grad():
            expected, found = model(images), network(images)
            loaded = ptq4cuda.load(tmp_path / "net.ptq4", model)(images)
            assert shape_of(found) == shape_of(expected) == shape_of(loaded)
            ratio = sqnr(tensors_of(expected), tensors_of(found))
            assert sqnr(tensors_of(found), tensors_of(loaded)) == math.inf
            assert sqnr(tensors_of(network(images)), tensors_of(found)) == math.inf
        assert ratio > 30
        assert record.sqnr == pytest.approx(ratio, abs=0.2)


def test_a_network_with_outputs_of_a_class_can_be_pickled(images: Tensor) -> None:
    class_of = {"model output": ModelOutput, "frozen": Frozen}
    for name, kind in class_of.items():
        model = Returns(name)
        network = quantize(model, [images], QuantConfig.fast(), progress=False)
        again = pickle.loads(pickle.dumps(network))
        assert type(again(images)) is kind
        assert torch.equal(again(images).logits, network(images).logits)


class Returns(Net):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return OUTPUTS[self.name](super().forward(x))


# --- defaults of the process ----------------------------------------------------------------------------------


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def default(request: pytest.FixtureRequest) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Make another dtype or device the default, as scripts do."""

    @contextmanager
    def other() -> Iterator[None]:
        torch.set_default_dtype(torch.float32 if request.param == "meta" else getattr(torch, request.param))
        try:
            with torch.device("meta") if request.param == "meta" else nullcontext():
                yield
        finally:
            torch.set_default_dtype(torch.float32)

    yield other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(),
        QuantConfig.paper(),
        QuantConfig.fast(target_sqnr=30.0, clipping="auto"),
        QuantConfig(activation_granularity="per_tensor", rounding="compensated", clipping="kld"),
        QuantConfig.fast(clipping="gaussian", execution="simulate"),
    ],
    ids=["default", "paper", "raised", "per tensor", "simulated"],
)
def test_defaults_of_the_process_change_nothing(
    images: Tensor,
    walked_by: str,
    config: QuantConfig,
    dtype: torch.dtype,
    default: Callable[[], AbstractContextManager[object]],
    tmp_path: Path,
) -> None:
    model, x = Net(walked_by == "modules").to(dtype), images[:16].to(dtype)
    expected = quantize(model, [x[:8], x[8:]], config, progress=False)
    y = expected(x)
    with default():
        network = quantize(model, [x[:8], x[8:]], config, progress=False)
        ptq4cuda.save(network, tmp_path / "net.ptq4")
        loaded = ptq4cuda.load(tmp_path / "net.ptq4", model)
        outputs = [network(x), loaded(x), expected(x)]
        text = str(ptq4cuda.report(network))
    for name, tensor in expected.state_dict().items():
        found = network.state_dict()[name]
        assert found.dtype == tensor.dtype, name
        assert torch.equal(found, tensor), name
    assert all(found.dtype == y.dtype and torch.equal(found, y) for found in outputs)
    assert text.split("total")[0] == str(ptq4cuda.report(expected)).split("total")[0]


def test_layers_by_hand_under_another_default() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        conv, linear = QuantConv2d(3, 4, 3), QuantLinear(3, 4)
        layer = QuantConv2d.from_float(nn.Conv2d(3, 4, 3, dtype=torch.float32), weight_bits=4)
        assert layer(torch.zeros(1, 3, 5, 5, dtype=torch.float32)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    for module in (conv, linear, layer):
        assert {t.dtype for t in module.buffers() if t.is_floating_point()} == {torch.float32}


# --- what cannot be copied ------------------------------------------------------------------------------------


class Guarded(Net):
    """Holds what deepcopy refuses, also in containers, and needs it."""

    def __init__(self, branches: bool) -> None:
        super().__init__(branches)
        self.lock, self.log = threading.Lock(), {"where": [sys.stderr, "err"], "count": 0}
        self.second.lock = self.lock
        self.seen = iter(range(3))
        self.stored = [self.second.weight * 2]  # with a history of gradients

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return super().forward(x)


def test_what_cannot_be_copied_is_shared(images: Tensor, walked_by: str, tmp_path: Path) -> None:
    model = Guarded(walked_by == "modules")
    check(model, [images], lambda m: m(images[:8]), walked_by, tmp_path)
    network = quantize(model, [images], QuantConfig.fast(), progress=False)
    assert network.lock is model.lock
    assert not model.lock.locked()
    assert network.log["where"][0] is sys.stderr
    network.log["count"] += 1
    assert model.log["count"] == 0


def test_a_module_that_refuses_to_be_copied_is_named(images: Tensor) -> None:
    class Refuses(nn.Conv2d):
        def __deepcopy__(self, memo: object) -> Any:
            raise RuntimeError("there is one of a kind")

    model = nn.Sequential(Refuses(3, 4, 3)).eval()
    with pytest.raises(ValueError, match=r"the model cannot be copied \(RuntimeError: there is one of a kind\)"):
        quantize(model, [images], progress=False)


def test_constant_arguments_are_found_batch_by_batch() -> None:
    """Tensors go to the device when a batch is looked at: no two batches are to be there at a time."""
    held: list[weakref.ref[Tensor]] = []

    class Batches(Inputs):
        def __init__(self) -> None:
            self.processes = ALONE

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: Any) -> Any:
            if index == len(self):
                raise IndexError
            x = torch.ones(1)
            held.append(weakref.ref(x))
            assert sum(ref() is not None for ref in held) <= 2  # this one, and that which its reader lets go next
            return (x,), {"flag": True, "number": index, "kind": 1 if index else True}

    class Model(nn.Module):
        def forward(
            self, x: Tensor, flag: bool, number: int, kind: int, sizes: Any = (1, "a"), *more: Any, **named: Any
        ) -> Tensor:
            return x

    assert constant_arguments(Model(), Batches()) == {"flag": True, "sizes": (1, "a")}
