"""Argument checks shared by the public ops: messages name the argument, the rule and the value.

Tensor values are checked on the CPU only: on a GPU the check would synchronize host and device.
"""

import sys
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INDEX_DTYPES = (torch.int64, torch.int32)


def check_head(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    prefix: str = "",
    policy_input: Tensor | None = None,
) -> None:
    """Check that hidden states (N, D), head weight (V, D) and bias (V,) match.

    Args:
        input, weight, bias: Tensors of one model.
        prefix: Prefix of the argument names in messages: "reference_" for the reference's.
        policy_input: Tensor whose device `input` must share; None when checking the policy itself.
    """
    names = (f"{prefix}input", f"{prefix}linear_weight", f"{prefix}linear_bias")
    check_tensor(names[0], input, INPUT_DTYPES, device=None)
    if policy_input is not None and input.device != policy_input.device:
        raise ValueError(f"{names[0]} must be on input's {policy_input.device}, got {input.device}")
    check_tensor(names[1], weight, INPUT_DTYPES, device=input.device)
    if bias is not None:
        check_tensor(names[2], bias, INPUT_DTYPES, device=input.device)
    if input.dim() != 2:
        raise ValueError(f"{names[0]} must be (N, D), got {tuple(input.shape)}")
    if weight.dim() != 2 or weight.shape[1] != input.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"{names[1]} must be (V, D) with V >= 1 and D >= 1 that of {names[0]}, "
            f"got {tuple(weight.shape)} beside {tuple(input.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{names[2]} must be ({weight.shape[0]},), got {tuple(bias.shape)}")


def check_models(
    input: Tensor,
    weight: Tensor,
    reference_input: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
) -> None:
    """Check the reference's tensors, and that N, V and the device are those of the policy."""
    check_head(
        reference_input, reference_weight, reference_bias, prefix="reference_", policy_input=input
    )
    if reference_input.shape[0] != input.shape[0]:
        raise ValueError(
            f"reference_input must have input's {input.shape[0]} rows, "
            f"got {tuple(reference_input.shape)}"
        )
    if reference_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"reference_linear_weight must have linear_weight's vocabulary of {weight.shape[0]}, "
            f"got {tuple(reference_weight.shape)}"
        )


def is_above_zero(value: Any, *, least: float = 0.0, most: float = sys.float_info.max) -> bool:
    """Whether `value` is a number, > 0 and in [least, most]."""
    if not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        return False
    try:
        number = float(value)
    # an int beyond the range of a float
    except OverflowError:
        return False
    return number > 0 and least <= number <= most


def check_whole(name: str, value: Any, low: int = -(2**63)) -> None:
    """Check for a signed 64-bit integer >= `low`, also as a tensor of one element."""
    if isinstance(value, Tensor):
        whole = value.numel() == 1 and value.dtype in INDEX_DTYPES
    else:
        whole = isinstance(value, (Integral, torch.SymInt))
    # a comparison would add a guard on the traced value
    traced = torch.compiler.is_compiling() or isinstance(value, torch.SymInt)
    if not whole or not (traced or low <= int(value) < 2**63):
        rule = ">= 0" if low == 0 else "of 64 bits"
        raise ValueError(f"{name} must be a whole number {rule}, got {value!r}")


def check_logit_transform(logit_scale: float, logit_softcap: float | None) -> None:
    """Check that scale and softcap are numbers, positive and finite in float32."""
    for name, value in (("logit_scale", logit_scale), ("logit_softcap", logit_softcap)):
        if isinstance(value, Tensor):
            raise ValueError(
                f"{name} must be a number, got a tensor, which would get no gradient; scale the "
                "hidden states by one that is learned"
            )
    # the logits are float32: 1e300 would overflow them, 1e-50 would divide by zero
    numbers = torch.finfo(torch.float32)
    in_float32 = partial(is_above_zero, least=numbers.tiny, most=numbers.max)
    if not in_float32(logit_scale):
        raise ValueError(f"logit_scale must be > 0 and finite in float32, got {logit_scale!r}")
    if logit_softcap is not None and not in_float32(logit_softcap):
        raise ValueError(
            f"logit_softcap must be None or > 0 and finite in float32, got {logit_softcap!r}"
        )


def check_target(target: Tensor, input: Tensor, ignore_index: int) -> None:
    """Check that targets are (N,) integers, and that `ignore_index` is an integer."""
    check_whole("ignore_index", ignore_index)
    check_tensor("target", target, INDEX_DTYPES, device=input.device)
    if target.shape != input.shape[:1]:
        raise ValueError(f"target must be ({input.shape[0]},), got {tuple(target.shape)}")


def check_target_range(target: Tensor, ignore_index: int, vocab: int) -> None:
    """Check, on the CPU only, that each target is in [0, V) or `ignore_index`."""
    if _on_cpu(target):
        # long(): truncated to 32 bits, ignore_index might equal a valid id
        check_range("target", target[target.long() != ignore_index], vocab)


def check_tensor(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], *, device: torch.device | None
) -> None:
    """Check for a dense tensor of `dtypes` on `device` (None: any), no DTensor, no dual tensor."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    # full_tensor is a method of DTensor; this avoids an import of torch.distributed
    if hasattr(tensor, "full_tensor"):
        raise ValueError(
            f"{name} is a DTensor, a plain tensor is needed: call the op inside the forward of the "
            "FSDP module that owns the head, or pass full_tensor()"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise ValueError(f"{name} must be a dense tensor, got a {layout} one")
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be one of {expected}, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the first argument, got {tensor.device}")
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None:
        raise ValueError(
            f"{name} has a forward-mode gradient, and the op has a backward one alone: "
            "torch.autograd.grad, not torch.func.jvp"
        )


def refuse_transforms(op: str) -> None:
    """Refuse calls inside torch.func transforms, for which the registered ops have no rules."""
    # private: torch has no public query; torch.compile refuses by itself
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise ValueError(
            f"fastpref_kernels.{op} must be called outside of torch.func's transforms (grad, vjp, "
            "jacrev, vmap), got a call in one: take torch.autograd.grad, and a loop for vmap"
        )


def check_range(name: str, index: Tensor, end: int) -> None:
    """Check, on the CPU only, that every element of `index` is in [0, end)."""
    if not _on_cpu(index) or not index.numel():
        return
    low, high = index.aminmax()
    if low < 0 or high >= end:
        worst = low if low < 0 else high
        raise ValueError(f"{name} must be in [0, {end}), got {worst.item()}")


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
