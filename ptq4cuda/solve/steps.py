"""Steps of a recipe that a network may be better off without: other samples than those that were fitted to say so.

Ranges that are searched, bits that channels divide and biases that match means all make less noise in a layer's own
output, and a network may be blind to what they take away and see what they add: errors that layers behind average
out when they are independent do not when they are alike. So a network that is quantized quickly is compared with the
plainest one, and where it is not clearly better each step is tried without, and left out where that clearly is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ptq4cuda.config import QuantConfig

FEWEST_JUDGED = 24  # samples of calibration, of which some can judge
_CLEARLY = 0.5  # of the noise of the plainest network
_LESS = 0.8  # of the noise with a step; halves of few samples differ by a decibel or two in what they say
# What a step is, and what is done without it.
_STEPS = {
    "activation_allocation": ("greedy", "uniform"),
    "clipping": ("mse", "minmax"),
    "bias_correction": ("output", "none"),
}


def steps_of(config: QuantConfig) -> dict[str, str]:
    """Return by the field of each step what is done without it; 8 bits need none of them.

    Of KLD nothing is judged: its search takes as long for few samples as for all.
    """
    if config.activation_bits == 8 or config.clipping == "kld":
        return {}
    return {field: without for field, (step, without) in _STEPS.items() if getattr(config, field) == step}


def steps_left_out(config: QuantConfig, noise: Callable[[QuantConfig, int], float]) -> dict[str, str]:
    """Return what is done in place of the steps without which there is clearly less noise.

    Args:
        config: how a network is quantized, quickly.
        noise: of a network that is quantized in some way from one half of some samples, on the other half.
    """
    steps = steps_of(config)
    if not steps:
        return {}
    plainest = QuantConfig.naive(
        config.weight_bits,
        config.activation_bits,
        first_last_bits=config.first_last_bits,
        depthwise_bits=config.depthwise_bits,
        overrides=config.overrides,
        activation_granularity=config.activation_granularity,
    )
    if noise(config, 0) < _CLEARLY * noise(plainest, 0):
        return {}
    left_out: dict[str, str] = {}
    least = noise(config, 0) + noise(config, 1)
    for field, without in steps.items():
        way = replace(config, **{**left_out, field: without})  # type: ignore[arg-type]
        found = noise(way, 0) + noise(way, 1)
        if found < _LESS * least:
            least, left_out = found, {**left_out, field: without}
    return left_out
