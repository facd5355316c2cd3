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
# Samples differ by a decibel or two in what they say.
_CLEARLY = 0.5  # of the noise of the plainest network
_LESS = 0.6  # of the noise with a step
# What a step is, and what is done without it. Scales of channels are folded into the weights that read them, which
# makes rows of weights uneven: where ranges differ widely, rounding loses more by that than the input gains.
_STEPS = {
    "activation_allocation": ("greedy", "uniform"),
    "clipping": ("mse", "minmax"),
    "bias_correction": ("output", "none"),
    "activation_granularity": ("per_channel", "per_tensor"),
}


def steps_of(config: QuantConfig) -> dict[str, str]:
    """Return by the field of each step what is done without it; 8 bits need none of them.

    Of KLD nothing is judged: its search takes as long for few samples as for all.
    """
    if config.activation_bits == 8 or config.clipping == "kld":
        return {}
    return {
        field: without
        for field, (step, without) in _STEPS.items()
        if getattr(config, field) == step and (config.fold_activation_scale or field != "activation_granularity")
    }


def steps_left_out(config: QuantConfig, noise: Callable[[QuantConfig], float]) -> dict[str, str]:
    """Return what is done in place of the steps without which there is clearly less noise.

    Args:
        config: how a network is quantized, quickly.
        noise: of a network quantized in some way, on other samples.
    """
    steps = steps_of(config)
    if not steps:
        return {}
    least = noise(config)
    plainest = QuantConfig.naive(
        config.weight_bits,
        config.activation_bits,
        first_last_bits=config.first_last_bits,
        depthwise_bits=config.depthwise_bits,
        overrides=config.overrides,
        activation_granularity=config.activation_granularity,
    )
    bound = noise(plainest)
    if least < _CLEARLY * bound:
        return {}
    left_out: dict[str, str] = {}
    for field, without in steps.items():
        found = noise(replace(config, **{**left_out, field: without}))  # type: ignore[arg-type]
        if found < (_LESS if least < bound else 1.0) * least:
            least, left_out = found, {**left_out, field: without}
    return left_out
