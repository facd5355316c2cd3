"""export_onnx(): a quantized network as an ONNX file of QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ptq4cuda.artifact.writing import write_whole
from ptq4cuda.execute.lowering import program_of
from ptq4cuda.export.summary import OnnxExport
from ptq4cuda.nn import QuantModule


def export_onnx(network: nn.Module, file: str | os.PathLike[str], example: Any, *, packed: bool = True) -> OnnxExport:
    """Write a quantized network as an ONNX file, of opset 21, that computes what the network does.

    Codes are uint8 between QuantizeLinear and DequantizeLinear of scale one: scales are in the weights, per channel,
    which stay as they were quantized. A runtime that fuses these around convolutions and matrix products computes
    them in integers; the result says which layers have all that it takes. The first dimension of inputs is free,
    other sizes are those of the example. It needs the package of the extra "export".

    Args:
        network: made by quantize() or load(), simulated or in integers, of float32; it is not changed.
        file: where to write, whole or not at all.
        example: what the network is called with: a tensor [N, ...], a tuple of its arguments, or a dict of them.
            Numbers and other plain values among them are fixed in the file.
        packed: store weights of up to 4 bits as uint4, which is brought to int8 where the file is read; False for
            runtimes that have no 4-bit types: bytes.

    Raises:
        TypeError: network is no torch.nn.Module.
        ValueError: the network was not traced as a whole, is not in float32, or calls something that has no
            counterpart in ONNX; the message names it.
        ImportError: the package onnx is missing.
        OSError: the file cannot be written.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ImportError(f"export_onnx needs {error.name}: run `pip install 'ptq4cuda[export]'`") from None
    from ptq4cuda.export.onnx_steps import model_of

    program = program_of(network)
    dtypes = [t.dtype for t in network.parameters() if t.is_floating_point()]
    dtypes += [module.dtype for module in network.modules() if isinstance(module, QuantModule)]
    other = next((dtype for dtype in dtypes if dtype != torch.float32), None)
    if other is not None:
        raise ValueError(f"the network computes with {other}, and ONNX files are of float32: call network.float()")
    arguments = example if isinstance(example, (tuple, dict)) else (example,)
    model, layers, floats = model_of(program, network, arguments, packed)
    onnx.checker.check_model(model, full_check=True)
    content = model.SerializeToString()
    write_whole(file, content)
    return OnnxExport(tuple(layers), tuple(floats), len(content))
