"""Model FLOPs utilization (MFU): the share of the devices' peak that the updates need."""

import re
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
"""Peak 16-bit matrix throughput in FLOP/s, without sparsity, from the vendors' data sheets. The
first name contained in a device's name, not followed by another digit, applies."""


class UsefulWork(NamedTuple):
    """FLOPs that a step needs, counting only products with weights.

    2 FLOPs per weight and token for each forward pass, including the reference's, 2 more for the
    gradient of the input and, if the weight is trained, 2 for that of the weight: 8 in DPO with a
    reference, 6 with adapters. A prompt that is computed once counts once; padding, recomputation,
    attention scores and adapters do not count.
    """

    per_token: int
    """FLOPs of the blocks per policy token."""
    per_scored: int
    """FLOPs of the head per scored token."""
    peak: float
    """Peak throughput of all devices, in FLOP/s."""

    def share(self, num_tokens: float, num_scored: float) -> float:
        """MFU in [0, 1].

        Args:
            num_tokens: Useful policy tokens per second.
            num_scored: Scored (response) tokens per second.
        """
        return (self.per_token * num_tokens + self.per_scored * num_scored) / self.peak


def useful_work(pair: Pair, options: ModelConfig, world: World) -> UsefulWork | None:
    """FLOPs that a step of policy and reference needs; None on a CPU, in float32, on a GPU of
    unknown peak, and for a mixture of experts."""
    if world.device.type != "cuda" or options.compute_dtype == "float32":
        return None
    peak = peak_of(torch.cuda.get_device_name(world.device))
    if peak is None:
        return None
    return count_work(pair, options.block_name, peak=peak * world.size)


def count_work(pair: Pair, block_name: str | None, *, peak: float) -> UsefulWork | None:
    """See `useful_work`; `peak` is that of all devices, in FLOP/s."""
    model, trains_all = pair.policy.model, pair.policy.adapters is None
    # a mixture: a token passes through only some of the experts
    if any(name.endswith("experts") for name, _ in model.named_modules()):
        return None
    blocks = sum(
        layer.weight.numel()
        if isinstance(layer, Conv1D)
        else layer.in_features * layer.out_features
        for block in find_blocks(model, block_name)
        for name, layer in block.named_modules()
        # counts the layer that an adapter wraps, not the adapter's own matrices
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
    """Peak FLOP/s of a device by its name; None if unknown."""
    # "RTX A1000" is no A100
    return next((peak for name, peak in PEAKS.items() if re.search(rf"{name}(?!\d)", device)), None)
