"""Quantizes architectures of timm, saves and loads them: python benchmarks/timm_networks.py [pattern ...].

With random weights, whose BatchNorms have the statistics of the images: what is shown is which networks are traced,
what folds and what integers execute, not how accurate they are. Without patterns it writes docs/networks.md.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import ptq4cuda
from ptq4cuda.artifact.record import record_of
from ptq4cuda.bench import architectures

try:
    import timm
except ImportError as error:
    raise SystemExit(f"{__doc__}\n{error}: pip install '.[networks]'") from None

DOCUMENT = Path(__file__).parents[1] / "docs" / "networks.md"
_NAMES = (
    "resnet10t seresnet18 skresnet18 ecaresnet50t resnext26ts resnest14d res2net50_14w_8s resnetv2_50 "
    "resnetblur18 gcresnext26ts nf_resnet26 eca_nfnet_l0 regnetx_002 regnety_002 regnetz_b16 gernet_s "
    "selecsls42 vgg11_bn densenet121 dla34 dpn48b hrnet_w18_small inception_v3 xception41 cspresnet50 "
    "cs3darknet_s darknet17 ese_vovnet19b_dw hgnetv2_b0 tresnet_m repvgg_a0 mobileone_s0 repvit_m0_9 "
    "repghostnet_050 rexnet_100 mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small_035 mnasnet_small "
    "efficientnet_b0 tf_efficientnet_b0 tf_efficientnet_lite0 efficientnetv2_rw_t mixnet_s tinynet_e lcnet_035 "
    "fbnetc_100 ghostnet_050 ghostnetv2_100 convnext_atto convnextv2_atto inception_next_atto fasternet_t0 "
    "starnet_s050 poolformer_s12 fastvit_t8 mobilevit_xxs edgenext_xx_small efficientvit_b0 swiftformer_xs"
)
_SIZES = {
    "inception_v3": 96,
    "convmixer_1024_20_ks9_p14": 56,
    **dict.fromkeys(("efficientformer_l1", "levit_128s", "levit_conv_128s", "visformer_tiny"), 224),
}
# Families of convolutional networks, small members, and the size of images where 64 pixels do not do.
NETWORKS: dict[str, int] = dict.fromkeys(_NAMES.split(), 64) | _SIZES


@dataclass
class Outcome:
    """What became of a network."""

    pixels: int
    walked_by: str
    reason: str
    folded: int
    norms: int
    integer: int
    layers: int
    equal: bool
    seconds: float


def build(name: str, x: Tensor, seed: int) -> nn.Module:
    """Return a network with random weights, its BatchNorms calibrated on images."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=10, **({"img_size": x.shape[-1]} if "img" in name else {}))
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return architectures.calibrate_batch_norm(model.eval(), x)


@torch.no_grad()
def try_network(name: str, pixels: int) -> Outcome:
    """Quantize, save and load a network."""
    x = architectures.images(8, pixels)
    model = build(name, x, seed=0)
    start = time.process_time()
    network = ptq4cuda.quantize(model, [x], ptq4cuda.QuantConfig.fast(), progress=False)
    seconds = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        ptq4cuda.save(network, f"{folder}/net.ptq4")
        loaded = ptq4cuda.load(f"{folder}/net.ptq4", build(name, x, seed=1))
    fresh = architectures.images(2, pixels, seed=1)
    record = record_of(network)
    norms = sum(isinstance(module, _BatchNorm) for module in model.modules())
    kinds = [layer for layer in record.layers if not layer.kind.startswith("BatchNorm")]
    return Outcome(
        pixels,
        record.walked_by,
        record.reason,
        norms - sum(layer.kind.startswith("BatchNorm") for layer in record.layers),
        norms,
        sum(layer.execution == "integer" for layer in kinds),
        len(kinds),
        torch.equal(network(fresh), loaded(fresh)),
        seconds,
    )


def table(outcomes: dict[str, Outcome]) -> str:
    """Return the outcomes as a table in Markdown."""
    lines = [
        "| network | pixels | walked by | BatchNorms folded / in all | layers in integers / in all | loaded "
        "| seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, o in outcomes.items():
        loaded = "bit-equal" if o.equal else "**other outputs**"
        lines.append(
            f"| {name} | {o.pixels} | {o.walked_by} | {o.folded} / {o.norms} | {o.integer} / {o.layers} | {loaded} "
            f"| {o.seconds:.1f} |"
        )
    return "\n".join(lines)


def document(outcomes: dict[str, Outcome]) -> str:
    """Return docs/networks.md."""
    by_modules = {name: o.reason for name, o in outcomes.items() if o.walked_by == "modules"}
    folded, norms = (sum(getattr(o, field) for o in outcomes.values()) for field in ("folded", "norms"))
    versions = f"timm {timm.__version__}, PyTorch {torch.__version__.partition('+')[0]}, {platform.machine()}"
    about = (
        f"{len(outcomes)} architectures of timm, quantized with `QuantConfig.fast()` on eight images, saved, and "
        f"loaded into a model with other weights ({versions}). Weights are random, with the statistics of the images "
        "in the BatchNorms: this shows what is traced, folded and executed in integers, and that files are read, not "
        "how accurate the networks are. The seconds are those that `quantize()` keeps one core of the CPU busy."
    )
    made = "Written by `python benchmarks/timm_networks.py` (`pip install '.[networks]'`)."
    norms_about = (
        f"{folded} of {norms} BatchNorms are folded. Those that are not follow something else than layers, or layers "
        "that are read elsewhere too. What is not in integers stays in float."
    )
    parts = ["# Networks", textwrap.fill(about, 118), made, table(outcomes), textwrap.fill(norms_about, 118)]
    if by_modules:
        parts.append("Walked by their modules, where nothing is folded:")
        parts.append("\n".join(f"- {name}: {reason}" for name, reason in by_modules.items()))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Try the networks whose names fit a pattern, all without one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="*", help="of names: 'resnet*'")
    patterns = parser.parse_args().pattern
    torch.set_num_threads(1)
    chosen = {
        n: p for n, p in NETWORKS.items() if not patterns or any(fnmatchcase(n, pattern) for pattern in patterns)
    }
    outcomes: dict[str, Outcome] = {}
    failed: dict[str, str] = {}
    for name, pixels in chosen.items():
        try:
            outcomes[name] = try_network(name, pixels)
            print(name, outcomes[name], flush=True)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            print(name, failed[name], flush=True)
    print(table(outcomes))
    for name, reason in failed.items():
        print(f"{name} failed: {reason}")
    if not patterns and not failed:
        DOCUMENT.write_text(document(outcomes))
    return 1 if failed or not all(o.equal for o in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
