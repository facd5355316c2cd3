"""A model that torch.fx cannot trace is walked by its modules.

For each layer, every chunk is run up to that layer, once in float and once as quantized so far. Layers that are
solved give what they gave before, as far as memory holds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ptq4cuda import graph
from ptq4cuda.activation import IDENTITY, Activation
from ptq4cuda.artifact.record import LayerRecord
from ptq4cuda.artifact.structure import replace_module
from ptq4cuda.calibrate.flow import Flow
from ptq4cuda.calibrate.frontier import Usage
from ptq4cuda.calibrate.inputs import Inputs, batch_size
from ptq4cuda.calibrate.signals import (
    Kept,
    LayerCall,
    Reader,
    Signal,
    Solution,
    Solver,
    WalkResult,
    progress_bar,
    record_float,
    record_solution,
)
from ptq4cuda.compat import WeakIdKeyDictionary, version_of
from ptq4cuda.containers import call_apart
from ptq4cuda.errors import naming_what_needs_memory
from ptq4cuda.metrics import Noise


def walk_modules(
    network: nn.Module,
    inputs: Inputs,
    solve: Solver,
    kept: Kept,
    progress: str,
    keep_before: bool = True,
    measured: bool = True,
) -> WalkResult:
    """Quantize the layers of any network in place, chunk by chunk.

    BatchNorm is not folded, and an activation before a layer is known only where it is a module.

    Raises:
        MemoryError: memory does not suffice; the message names the layer.
        OSError: nor does the folder that the rest goes to.
    """
    names, flow = _observe(network, kept, inputs.example)
    walk = _ModuleWalk(network, names, flow.ends, inputs, solve, keep_before, measured)
    noise = Noise()
    with torch.no_grad(), progress_bar(len(flow.order), progress) as bar, walk.in_place():
        waiting = [module for module in flow.order if module in names]
        while waiting:
            for module in waiting:
                with naming_what_needs_memory(f"at layer {names[module]!r}"):
                    walk.solve_layer(module)
                bar.update()
            with naming_what_needs_memory("in a forward of the model"):
                noise = walk.compare()
            waiting = [module for module in walk.called_by_any() if module not in walk.tried]  # by other batches
    for module, solution in walk.solved.items():
        replace_module(network, module, solution.module)
    _try_once(network, inputs)
    records = walk.finished_records()
    hidden = graph.hidden_modules(network)
    for name, module in network.named_modules():
        if module in hidden:
            continue
        reason = graph.why_float(module) or (kept(name) if graph.quantized_spec(module) else "")
        if module in names and module not in walk.solved:
            reason = walk.left.get(module, "never called as a module")
        if reason:
            records.append(record_float(name, module, type(module).__name__, reason))
    for function in flow.functions:
        reason = f"a call of {function}; only modules are quantized where torch.fx cannot trace the model"
        records.append(record_float(function, None, function, reason))
    clipped = any(call.signal.outliers for call in walk.solved_calls.values())
    return WalkResult(records, noise, clipped, *walk.usage.found)


@torch.no_grad()
def _try_once(network: nn.Module, inputs: Inputs) -> None:
    """Raise ValueError where a model's own code needs the float layers that were replaced."""
    try:
        call_apart(network, *inputs.example)
    except (AttributeError, StopIteration) as error:  # or iterates over parameters, of which there are none
        raise ValueError(
            f"the model's own code reads what a quantized layer does not have ({error}): leave that layer in float "
            "by overrides"
        ) from error


def _observe(network: nn.Module, kept: Kept, example: Any) -> tuple[dict[nn.Module, str], Flow]:
    """Return the layers to quantize, with their names, and what a forward tells about them."""
    while True:
        hidden = graph.hidden_modules(network)
        modules = {module: name for name, module in network.named_modules() if module not in hidden}
        names = {m: name for m, name in modules.items() if graph.quantized_spec(m) and not kept(name)}
        others = [m for m in modules if m not in names and (graph.quantized_spec(m) or graph.why_float(m))]
        flow = Flow(names, others).run(network, *example)
        for module in flow.read:
            graph.leave(module, "other code than its own reads its parameters")
        for module in flow.watched:
            graph.leave(module, "its hooks tell it from a quantized layer")
        for module in flow.sized:
            graph.leave(module, "it is called with an output_size")
        if not flow.read and not flow.watched and not flow.sized:
            return names, flow


class _Reached(BaseException):
    """Ends a forward at the layer that is to be solved; no code of a model may take it for an error of its own."""


@dataclass(eq=False)
class _Arrival:
    """What a layer is called with: its input, and what that was before its activation, where it is known."""

    x: Tensor
    before: Tensor | None
    activation: Activation


class _ModuleWalk:
    def __init__(
        self,
        network: nn.Module,
        names: dict[nn.Module, str],
        ends: set[nn.Module],
        inputs: Inputs,
        solve: Solver,
        keep_before: bool,
        measured: bool,
    ) -> None:
        self.keep_before, self.measured = keep_before, measured
        self.network, self.names, self.ends, self.inputs, self.solve = network, names, ends, inputs, solve
        self.frontier, self.processes = inputs.frontier, inputs.processes
        self.usage = Usage(inputs.frontier)
        self.solved: dict[nn.Module, Solution] = {}
        self.solved_calls: dict[nn.Module, LayerCall] = {}
        self.records: dict[nn.Module, LayerRecord] = {}
        self.left: dict[nn.Module, str] = {}
        self.tried: set[nn.Module] = set()
        self.called: Counter[nn.Module] = Counter()  # in one forward, at most
        # Outputs of layers, in the order in which these were solved, by chunk, stream and call.
        self.outputs: dict[nn.Module, dict[tuple[int, bool, int], Tensor]] = {}
        self.output_bytes = 0
        # Of the forward under way:
        self.chunk, self.quantized = 0, False
        self.until: nn.Module | None = None
        self.arrival: _Arrival | None = None
        self.calls: Counter[nn.Module] = Counter()
        self.settled = True  # whether no layer that is still to be solved was called
        self.entering: dict[nn.Module, Tensor] = {}
        # By the output of an activation, what went in. The versions tell whether either was changed in place since.
        self.before: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Take the place of the layers' forward, and watch the activations."""
        hooks = []
        for module in self.network.modules():
            if graph.module_activation(module) is not None:
                hooks += [module.register_forward_pre_hook(self._before_activation)]
                # It sees what a module itself computes: the model's own hooks come after.
                hooks += [module.register_forward_hook(self._on_activation, prepend=True)]
        try:
            for module in self.names:
                vars(module)["forward"] = partial(self._forward, module)
            yield
        finally:
            for module in self.names:
                vars(module).pop("forward", None)
            for hook in hooks:
                hook.remove()

    def _run(self, chunk: int, quantized: bool, until: nn.Module | None = None) -> Any:
        """Run the network on a chunk in one of the streams, always with the same random numbers."""
        self.chunk, self.quantized, self.until, self.arrival = chunk, quantized, until, None
        self.calls, self.settled, self.before = Counter(), True, WeakIdKeyDictionary()
        device = self.frontier.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.inputs.first + chunk)
            try:
                return call_apart(self.network, *self.inputs[chunk])
            except _Reached:
                return None
            finally:
                self.called |= self.calls
                self.entering.clear()

    def _forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0] if args else kwargs["input"]
        turn = self.calls[module]
        self.calls[module] += 1
        if module is self.until and turn == 0:
            self.arrival = _Arrival(x, *self._activation_before(x))
            raise _Reached
        if module not in self.solved:
            self.settled &= module in self.left
            return self._float(module, x)
        key = (self.chunk, self.quantized, turn)
        if key in self.outputs[module]:
            held: Tensor = self.frontier.fetch(self.outputs[module][key])
            return held.clone()  # the model may write into it
        clip = self.solved_calls[module].signal.clip
        if clip is not None:
            x = clip.clip(x)
        y: Tensor = self.solved[module].module(x) if self.quantized else self._float(module, x)
        if self.settled:
            self._keep(module, key, y)
        return y

    def _float(self, module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = type(module).forward(module, x)
        return y

    def _keep(self, module: nn.Module, key: tuple[int, bool, int], y: Tensor) -> None:
        """Keep an output for the forwards that follow, in half of the memory.

        It takes the room of layers that were solved before, and no other: all chunks come by in turn, and where the
        oldest outputs made room none would be there when its turn comes.
        """
        size, all_room = y.numel() * y.element_size(), self.frontier.room
        room = all_room // 2
        for before, kept in self.outputs.items():
            while before is not module and kept and self.output_bytes + size > room:
                _, dropped = kept.popitem()
                self.output_bytes -= dropped.numel() * dropped.element_size()
            if before is module or self.output_bytes + size <= room:
                break
        if self.output_bytes + size <= room and self.frontier.bytes + size <= all_room:
            self.outputs[module][key] = self.frontier.hold(y.clone())
            self.output_bytes += size

    def _before_activation(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.entering[module] = args[0].clone() if getattr(module, "inplace", False) else args[0]

    def _on_activation(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        before = self.entering.pop(module)
        self.before[output] = (version_of(output), before, version_of(before), graph.module_activation(module))

    def _activation_before(self, x: Tensor) -> tuple[Tensor | None, Activation]:
        """Return what x was before its activation, and the activation, where they are known."""
        version, before, version_before, activation = self.before.get(x, (0, None, 0, IDENTITY))
        if before is None or (version_of(x), version_of(before)) != (version, version_before):
            return None, IDENTITY
        return before, activation

    def _arrive(self, chunk: int, quantized: bool, module: nn.Module) -> _Arrival | None:
        """Return what a layer is called with, None where a chunk does not call it."""
        self._run(chunk, quantized, until=module)
        found, self.arrival = self.arrival, None
        if found is not None:
            found.x = self.frontier.hold(found.x)
            found.before = self.frontier.hold(found.before) if self.keep_before else None
        return found

    def solve_layer(self, module: nn.Module) -> None:
        """Solve a layer for what it is called with, and first only."""
        self.tried.add(module)
        chunks, arrivals, streams, lost = [], [], [], False
        for chunk in range(len(self.inputs)):
            found = self._arrive(chunk, False, module)
            # Before the first layer is solved both streams are one.
            other = self._arrive(chunk, True, module) if self.solved else found
            if found is None or other is None or found.x.shape != other.x.shape:
                continue
            if found.x.dim() == 0 or len(found.x) == 0 or len(found.x) % batch_size(self.inputs[chunk]):
                lost = True
                break
            chunks.append(chunk)
            arrivals.append(found)
            streams.append((found.x, other.x))
        if any(self.processes.gather([lost])):
            self.left[module] = "its input does not keep the samples along dimension 0"
            return
        activations = self.processes.gather(
            [None if found.activation == IDENTITY else found.activation for found in arrivals]
        )
        if not activations:
            return
        signal = Signal(self.frontier, self.processes, streams)
        if activations[0] is not None and len(set(activations)) == 1:
            if self.keep_before:
                signal.before = [found.before for found in arrivals if found.before is not None]
            signal.activation = activations[0]
        arrivals.clear()
        spec = graph.quantized_spec(module)
        assert spec is not None
        call = LayerCall.of(
            self.names[module],
            module,
            spec,
            signal,
            [Reader(spec, module)],
            run=partial(self._float, module),
            first_or_last=module in self.ends,
        )
        solution = self.solve(call)
        noise, self.outputs[module] = Noise(), {}
        for chunk, y, y_quantized in zip(chunks, call.outputs, solution.outputs_for(signal), strict=True):
            if self.measured:
                noise.add(y, y_quantized)
            self._keep(module, (chunk, False, 0), y)
            self._keep(module, (chunk, True, 0), y_quantized)
        if self.measured:
            self.records[module] = record_solution(call, solution, noise.merged(self.processes))
        call.outputs, signal.streams, signal.before = [], [], None  # let the tensors go
        solution.outputs = None
        self.solved[module], self.solved_calls[module] = solution, call

    def compare(self) -> Noise:
        """Run the network whole, in both streams, and return the noise of its output."""
        noise = Noise()
        for chunk, batch in enumerate(self.inputs):
            expected, found = (self._run(chunk, quantized) for quantized in (False, True))
            noise.add(expected, found, batch_size(batch))
        return noise.merged(self.processes)

    def called_by_any(self) -> Counter[nn.Module]:
        """Return how often each layer was called in one forward, at most, in any process."""
        modules = {name: module for module, name in self.names.items()}
        called: Counter[nn.Module] = Counter()
        for own in self.processes.gather([{self.names[m]: times for m, times in self.called.items()}]):
            called |= Counter({modules[name]: times for name, times in own.items()})
        return called

    def finished_records(self) -> list[LayerRecord]:
        """Return what became of the layers, once all forwards are through."""
        called = self.called_by_any()
        for module, record in self.records.items():
            if called[module] > 1:
                record.reason = f"called {called[module]} times, its input quantized for the first"
        return list(self.records.values())
