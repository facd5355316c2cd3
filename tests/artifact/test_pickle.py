"""A quantized network is a module like others: copied, pickled, read by another process, it is what it was."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import ptq4cuda
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact.record import record_of
from ptq4cuda.execute.lowering import lower_layers
from small_networks import Residual, calibrate_batch_norm

FAST = QuantConfig.fast()


class Branching(Residual):
    """torch.fx cannot trace it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > -1e9 else -x)


class Counter:
    """A hook that pickle can hold."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        self.calls += 1
        return output + 1.0

    def before(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> object:
        return (args[0] * 0.5,), kwargs


def saved(network: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda network: pickle.loads(pickle.dumps(network)),
    "torch.save": saved,
}
NETWORKS = [(kind, execution) for kind in (Residual, Branching) for execution in ("simulate", "integer")]


def made(kind: type[nn.Module], execution: str, images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = calibrate_batch_norm(kind(), images)
    return quantize(model, [images], QuantConfig.fast(execution=execution), progress=False)  # type: ignore[arg-type]


def same(network: nn.Module, other: nn.Module, x: Tensor, folder: Path) -> None:
    """Assert that a network and what was made of it are the same in all that they do."""
    assert torch.equal(other(x), network(x))
    assert record_of(other) == record_of(network)
    assert str(ptq4cuda.report(other)) == str(ptq4cuda.report(network))
    state, expected = other.state_dict(), network.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
    ptq4cuda.save(network, folder / "one.ptq4")
    ptq4cuda.save(other, folder / "other.ptq4")
    assert (folder / "one.ptq4").read_bytes() == (folder / "other.ptq4").read_bytes()


@pytest.mark.parametrize("made_of", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(("kind", "execution"), NETWORKS)
def test_a_copy_is_the_network(
    kind: type[nn.Module],
    execution: str,
    made_of: Callable[[nn.Module], nn.Module],
    images: Tensor,
    tmp_path: Path,
) -> None:
    network = made(kind, execution, images)
    other = made_of(network)
    assert isinstance(other, fx.GraphModule) == (kind is Residual)
    same(network, other, images, tmp_path)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for name in state:
        if name.endswith("bias"):
            state[name] += 1.0
    if execution == "integer":
        with pytest.raises(RuntimeError, match="a network in integers loads no state_dict"):
            other.load_state_dict(state)
    else:
        other.load_state_dict(state)
        assert not torch.equal(other(images), network(images))
        other.load_state_dict(network.state_dict())
    same(network, made_of(other), images, tmp_path)


@pytest.mark.parametrize("made_of", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(("kind", "execution"), NETWORKS)
def test_hooks_of_a_network_are_copied(
    kind: type[nn.Module], execution: str, made_of: Callable[[nn.Module], nn.Module], images: Tensor
) -> None:
    network = made(kind, execution, images)
    plain = network(images)
    network.register_forward_hook(Counter())
    network.fc.register_forward_hook(Counter())
    network.register_forward_pre_hook(Counter().before, with_kwargs=True)
    other = made_of(network)
    expected = network(images)
    assert not torch.equal(expected, plain)
    assert torch.equal(other(images), expected)
    for name in ("", "fc"):
        (hook,) = other.get_submodule(name)._forward_hooks.values()
        assert isinstance(hook, Counter) and hook.calls == 1


def test_another_process_reads_them(images: Tensor, tmp_path: Path) -> None:
    for number, (kind, execution) in enumerate(NETWORKS):
        network = made(kind, execution, images)
        torch.save((network, images, network(images), str(ptq4cuda.report(network))), tmp_path / f"{number}.pt")
    program = (
        "import sys, torch\n"
        f"sys.path[:] = {[*sys.path, str(Path(__file__).parents[2])]!r}\n"  # where this file's module is found
        f"for number in range({len(NETWORKS)}):\n"
        f"    network, x, y, report = torch.load('{tmp_path}/%d.pt' % number, weights_only=False)\n"
        "    import ptq4cuda\n"
        "    assert torch.equal(network(x), y) and str(ptq4cuda.report(network)) == report\n"
        f"    ptq4cuda.save(network, '{tmp_path}/net.ptq4')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_network_made_by_hand(images: Tensor) -> None:
    """lower_layers lets any module execute in integers, and leaves there what refuses to load others' weights."""
    network = nn.Sequential(
        ptq4cuda.QuantConv2d.from_float(nn.Conv2d(3, 4, 3), quantizer(), weight_bits=8, bias_correction="none")
    )
    lower_layers(network)
    for made_of in COPIES.values():
        other = made_of(network)
        assert torch.equal(other(images), network(images))
        with pytest.raises(RuntimeError, match="a network in integers loads no state_dict"):
            other.load_state_dict(network.state_dict())


def quantizer() -> ptq4cuda.QuantParams:
    bits = torch.full((3,), 8, dtype=torch.uint8)
    return ptq4cuda.QuantParams.from_range(torch.full((3,), -3.0), torch.full((3,), 3.0), bits)
