"""Quantizes a network and packages it with AOTInductor for main.cpp.

python package.py FOLDER writes net.pt2, a batch of images as input.bin, of SHAPE, and what the network makes of it as
expected.bin.
"""

import argparse
from pathlib import Path

import torch

import ptq4cuda
from ptq4cuda.bench.architectures import build_resnet18, images

SHAPE = (5, 3, 64, 64)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path, metavar="FOLDER")
folder = parser.parse_args().folder
net = build_resnet18(num_classes=10, width=0.25).eval()  # any trained network
qnet = ptq4cuda.quantize(net, images(32, size=64).split(16), ptq4cuda.QuantConfig.fast())
batch = torch.export.Dim("batch", min=1, max=64)
program = torch.export.export(qnet, (images(4, size=64),), dynamic_shapes=({0: batch},))
torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "net.pt2"))

x = images(SHAPE[0], size=SHAPE[-1], seed=1)
with torch.no_grad():
    expected = qnet(x)
x.numpy().tofile(folder / "input.bin")
expected.numpy().tofile(folder / "expected.bin")
