"""The one scale of a layer's integer activations: which range of values the codes cover.

It is the range of all that calibration saw, so that nothing that was seen saturates: TensorRT-LLM's
and llm-compressor's static scale for a whole tensor.
"""

import torch
from torch import Tensor

from apportion.errors import ApportionError
from apportion.kernels.reference import ACTIVATION_LEVELS, SMALLEST_SCALE


def scale_of(peak: Tensor | None) -> Tensor:
    """What `kernels.formats` stores as `activation_scale`.

    Args:
        peak: float32 [in], finite, the largest |x| of each input. Zeros: nothing was seen but them,
            and the scale is 0, so that each token has its own.

    Raises:
        ApportionError: Nothing is known of the inputs' range.
    """
    if peak is None:
        raise ApportionError("a scale for all inputs needs the largest value of each")
    largest = peak.max().reshape(1)
    return torch.where(largest > 0, (largest / ACTIVATION_LEVELS).clamp_min(SMALLEST_SCALE), 0.0)
