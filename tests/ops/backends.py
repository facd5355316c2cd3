"""The implementations of the operators that every test runs on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map, tree_map_only

BACKENDS = ["reference", "cpu", "cuda_on_cpu"]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
if torch.cuda.is_available():
    BACKENDS.append(CUDA)  # type: ignore[arg-type]
NATIVE = BACKENDS[1:]
CUDA_SOURCES = BACKENDS[2:]


class Backend:
    """One implementation of the operators.

    Its operators are attributes. They take tensors of any device, and return tensors on the CPU.
    """

    def __init__(self, name: str, namespace: str, device: str = "cpu") -> None:
        self.name = name
        self.namespace = namespace
        self.device = device

    @property
    def native(self) -> bool:
        return self.name != "reference"

    @property
    def is_cuda_source(self) -> bool:
        return self.name in ("cuda", "cuda_on_cpu")

    def __repr__(self) -> str:
        return self.name

    def __getattr__(self, name: str) -> Any:
        op = getattr(getattr(torch.ops, self.namespace), name)

        def call(*args: Any, out: torch.Tensor | None = None) -> Any:
            args = tree_map_only(torch.Tensor, lambda a: _there(self.device, a), args)
            if out is None:
                return tree_map(torch.Tensor.cpu, op(*args))
            there = out if self.device == "cpu" else same_storage_on(self.device, out)
            op.out(*args, out=there)
            return out if there is out else out.copy_(there)

        call.out = call  # type: ignore[attr-defined]  # torch's operators have their overload under this name
        return call


def _there(device: str, x: torch.Tensor) -> torch.Tensor:
    return x.to(device) if x.requires_grad or x.device.type == device else same_storage_on(device, x)


def same_storage_on(device: str, x: torch.Tensor) -> torch.Tensor:
    """Copy x with what lies around it in memory, so that its strides and its alignment stay."""
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())
