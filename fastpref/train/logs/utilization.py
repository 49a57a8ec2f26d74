"""What share of the devices' matrix units a run keeps busy with what its updates need (MFU)."""

from typing import NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from fastpref.config import ModelConfig
from fastpref.distributed import World
from fastpref.model.adapters.targets import is_linear
from fastpref.model.blocks import find_blocks
from fastpref.model.pair import Pair

PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10G": 70e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Products of 16-bit matrices a second, without sparsity, in operations: the makers' data sheets.
The first name that a device's has in it counts."""


class UsefulWork(NamedTuple):
    """Operations that a step needs, those of products with weights alone.

    2 operations a weight and token for each forward, the reference's included, 2 more for the
    gradient of the input and, where the weight is trained, 2 for the weight's: 8 of DPO with a
    reference, 6 beside adapters. A prompt that is computed once counts once; padding, what is
    computed again, attention's scores and adapters count nothing.
    """

    per_token: int
    """Of the blocks."""
    per_scored: int
    """Of the head."""
    peak: float
    """Operations a second of all devices."""

    def share(self, num_tokens: float, num_scored: float) -> float:
        """MFU, in [0, 1], of so many tokens a second, of which so many are scored."""
        return (self.per_token * num_tokens + self.per_scored * num_scored) / self.peak


def useful_work(pair: Pair, options: ModelConfig, world: World) -> UsefulWork | None:
    """What a step of a policy and its reference needs; None where a peak is not known, or a token
    does not see every weight.
    """
    if world.device.type != "cuda" or options.compute_dtype == "float32":
        return None
    peak = peak_of(torch.cuda.get_device_name(world.device))
    if peak is None:
        return None
    return count_work(pair, options.block_name, peak=peak * world.size)


def count_work(pair: Pair, block_name: str | None, *, peak: float) -> UsefulWork | None:
    """See `useful_work`; `peak` is that of all devices."""
    model, trains_all = pair.policy.model, pair.policy.adapters is None
    # of which a token sees some
    if any(name.endswith("experts") for name, _ in model.named_modules()):
        return None
    blocks = sum(
        layer.weight.numel()
        if isinstance(layer, Conv1D)
        else layer.in_features * layer.out_features
        for block in find_blocks(model, block_name)
        for name, layer in block.named_modules()
        # without adapters, and the layers that these stand around
        if is_linear(layer) and "lora_" not in name
    )
    passes = (3 if trains_all else 2) + (pair.reference is not None)
    vocab_size, hidden_size = pair.policy.path.vocab_size, pair.policy.head.weight.shape[-1]
    return UsefulWork(
        per_token=2 * passes * blocks,
        per_scored=2 * passes * vocab_size * hidden_size,
        peak=peak,
    )


def peak_of(device: str) -> float | None:
    """Operations a second of a device by its name; None if it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)
