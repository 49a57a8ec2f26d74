"""A frozen model's linear layers in 4 bits: NF4 with double quantization (QLoRA, arXiv:2305.14314).

The layers are bitsandbytes'. Each is quantized on the device from the loaded weights, so a model
that does not fit the device in 16 bits can be used in 4, and any source that can be loaded can be
quantized, including one with merged adapters. Embeddings, norms and the head are not quantized.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastpref.distributed import World
from fastpref.errors import ConfigError
from fastpref.model.adapters.targets import is_linear
from fastpref.model.blocks import find_blocks


def quantize_blocks(model: Any, block_name: str | None, world: World) -> None:
    """Replace the linear layers of a model's blocks by 4-bit ones on the device, in place.

    Args:
        model: A causal LM of transformers, on the CPU; only rank 0's has weights.
        block_name: Class of the transformer blocks, None: found from the model.
        world: The ranks, each of which gets every layer whole.

    Raises:
        ConfigError: the blocks have no linear layers of torch.
    """
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    check_quantizable(model, block_name)
    for parent, name, layer in list(quantizable_layers(model, block_name)):
        weight = layer.weight.data.to(world.device)
        if world.size > 1:
            dist.broadcast(weight, src=0)
        with torch.device("meta"):
            quantized = Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=weight.dtype,
                quant_type="nf4",
            )
        parameter: Any = Params4bit(weight, requires_grad=False, quant_type="nf4", module=quantized)
        # moving it to a device quantizes it
        quantized.weight = parameter.to(world.device)
        # broadcast later, with all that is not quantized
        quantized.bias = layer.bias
        setattr(parent, name, quantized)
    # the flag by which peft knows to put adapters beside 4-bit layers
    model.is_loaded_in_4bit = True


def check_quantizable(model: Any, block_name: str | None) -> None:
    """Refuse a model without layers that can be quantized; it may be on the meta device.

    Raises:
        ConfigError: the blocks have no linear layers of torch.
    """
    if not any(True for _ in quantizable_layers(model, block_name)):
        raise ConfigError(
            f"adapter=qlora: {type(model).__name__} has no torch.nn.Linear in its blocks, which is "
            "all that can be quantized; choose adapter=lora"
        )


@torch.no_grad()
def round_blocks(model: Any, block_name: str | None, device: torch.device) -> None:
    """Quantize and dequantize the linear layers of a model's blocks, in place.

    Args:
        model: A causal LM of transformers, on the CPU.
        block_name: Class of the transformer blocks, None: found from the model.
        device: Device to quantize on; gives the same bits as in training, if the dtype is the same.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for _, _, layer in quantizable_layers(model, block_name):
        weight = layer.weight.to(device)
        packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        layer.weight.copy_(dequantize_4bit(packed, state))


def quantizable_layers(model: Any, block_name: str | None) -> Iterator[tuple[nn.Module, str, Any]]:
    """(parent module, name in it, layer) of each linear layer of the blocks."""
    for block in find_blocks(model, block_name):
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear) and is_linear(module):
                parent, _, name = path.rpartition(".")
                yield block.get_submodule(parent), name, module
