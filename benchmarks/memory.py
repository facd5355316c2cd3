"""What memory quantize() takes: python benchmarks/memory.py [--traced] [--network resnet50] [--limit MIB] ...

Quantizes a random network of ptq4cuda.bench.architectures within a memory_limit, walked by its modules unless
--traced is given, and prints seconds of the CPU and the most memory that the process took, with Python, torch, the
model and the calibration images.
"""

from __future__ import annotations

import argparse
import resource
import time

from torch import Tensor, nn

from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact.record import record_of
from ptq4cuda.bench import architectures

DIFFERENT = 16  # images, which are then repeated: memory does not look at values


class Untraceable(nn.Module):
    """A network behind a branch on values, which torch.fx cannot trace."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output."""
        return x if bool(x.isnan().any()) else self.network(x)


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50", choices=sorted(architectures.ARCHITECTURES))
    parser.add_argument("--traced", action="store_true", help="walk it by its graph")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, default=512, help="memory_limit in MiB")
    parser.add_argument("--spill-folder", help="on a disk, not in memory as /tmp may be")
    arguments = parser.parse_args()
    network = architectures.ARCHITECTURES[arguments.network]().eval()
    images = architectures.images(DIFFERENT, arguments.size).repeat(-(-arguments.images // DIFFERENT), 1, 1, 1)
    start = time.process_time()
    quantized = quantize(
        network if arguments.traced else Untraceable(network).eval(),
        images[: arguments.images].split(arguments.batch),
        QuantConfig.fast(execution="simulate"),
        memory_limit=arguments.limit << 20,
        spill_folder=arguments.spill_folder,
    )
    seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    record = record_of(quantized)
    held, spilled = record.frontier_bytes >> 20, record.spilled_bytes >> 20
    print(
        f"{arguments.network}, {arguments.images} images of {arguments.size} pixels in batches of {arguments.batch}: "
        f"{seconds:.0f} CPU s, peak {peak:,} MiB; between layers {held:,} MiB, {spilled:,} MiB went to files"
    )


if __name__ == "__main__":
    main()
