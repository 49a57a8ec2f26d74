"""Memory plan of a run: the bytes that each device will hold, by purpose."""

from dataclasses import dataclass
from typing import NamedTuple

from fastpref.memory.count import TokenBytes, Weights

GIB = 2**30
SMALL_PARTS = 0.03
"""Share of a device's memory reserved for allocator fragmentation and other users of the device."""
SEVERAL_RANKS = 0.03
"""Additional reserve with several ranks, for buffers of collectives and as a margin: there a rank
that runs out of memory ends the run."""


class Sizes(NamedTuple):
    """Bytes per parameter, by purpose."""

    master: int
    """Master weight."""
    compute: int
    """Weight in the compute dtype."""
    state: int
    """Optimizer state."""
    reference: int | None
    """Stored weight of the reference; 0 if it is the policy without its adapters, None without a
    reference."""


class HeadBytes(NamedTuple):
    """Workspace of the LM-head ops beyond inputs and results, in bytes."""

    fixed: int
    per_token: int = 0
    """Exponentials kept for the backward, per token, up to `limit`."""
    limit: int = 0
    """Limit of all exponentials together."""

    def of(self, num_tokens: float) -> float:
        """Bytes for `num_tokens` tokens, all of them scored."""
        return self.fixed + min(self.per_token * num_tokens, self.limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Memory of one device in training, in bytes."""

    masters: int
    """Master weights: this device's shard, or all adapters, also the one of the reference."""
    weights: int
    """Weights in the compute dtype. One device: all, 0 if the masters have that dtype. Several: the
    gathered part of policy and reference. With adapters: the frozen model, or its shard and the
    gathered part."""
    gradients: int
    """This device's shard, and with several devices those being reduced."""
    optimizer: int
    reference: int
    head: HeadBytes
    """Workspace of the LM-head ops, including the gradient of the head's weight."""
    kept_per_token: float
    """Activations kept from the forward to the backward, per token."""
    backward_per_token: float
    """Additional memory of a block's backward, per token."""
    scored_per_token: float
    """Inputs of the head and their gradients, per scored token."""
    has_adapters: bool
    """Whether adapters are trained instead of all weights."""
    made: int
    """Temporary weights that adapters compute, such as whole matrices of experts."""
    process: int
    """CPU only: memory of the process beside tensors."""
    reserve: int
    """Memory left unused."""

    @property
    def fixed(self) -> int:
        """Memory independent of the size of a micro-batch, without the head's and the reserve."""
        of_weights = self.masters + self.weights + self.gradients + self.optimizer
        return of_weights + self.made + self.reference + self.process

    def peak(self, num_tokens: float) -> int:
        """Peak memory, without the reserve.

        Args:
            num_tokens: Tokens of a micro-batch, all of them scored.
        """
        head = self.head.of(num_tokens) + self.scored_per_token * num_tokens
        body = self.backward_per_token * num_tokens
        return int(self.fixed + self.kept_per_token * num_tokens + max(head, body))

    def most_tokens(self, available: int) -> int:
        """Largest micro-batch, in tokens, that fits in `available` bytes, >= 0."""
        spare = available - self.reserve - self.fixed
        per_token, head = self.kept_per_token + self.scored_per_token, self.head
        # the exponentials of all tokens are kept, or they reach their limit
        with_head = max(
            (spare - head.fixed) / (per_token + head.per_token),
            (spare - head.fixed - head.limit) / per_token,
        )
        in_body = spare / (self.kept_per_token + self.backward_per_token)
        return max(0, int(min(with_head, in_body)))

    def parts(self) -> dict[str, int]:
        """Terms of `fixed`, by name."""
        fields = {"masters": self.masters, "weights": self.weights}
        if self.has_adapters:
            fields = {"adapters": self.masters, "base": self.weights, "made of both": self.made}
        rest = ("gradients", "optimizer", "reference", "process")
        return fields | {name: getattr(self, name) for name in rest}


class Device(NamedTuple):
    """Devices that a model is trained on."""

    type: str
    """cuda or cpu."""
    num: int
    """Number of devices; with several the model is sharded, unless `replicated`."""
    memory: int
    """Bytes per device."""
    process: int = 0
    """CPU only: bytes used by the process before a model is loaded."""
    replicated: bool = False
    """Whether every device holds the whole frozen model (adapters only)."""


def plan_memory(
    weights: Weights,
    tokens: TokenBytes,
    sizes: Sizes,
    device: Device,
    *,
    head: HeadBytes,
) -> MemoryPlan:
    """Plan the memory that training takes on each device.

    Args:
        head: Workspace of the LM-head ops, without the gradient of the head's weight.
    """
    share, D = -(-weights.total // device.num), weights.hidden_size
    trained = weights.adapters or share
    compute, of_reference = sizes.compute, sizes.reference
    computing, in_transit = _computed_with(weights, sizes, device)
    # hidden states, their gradients in float32 and in their own dtype, a copy without padding
    scored = D * (3 * compute + 4)
    if of_reference is not None:
        scored += D * compute
    # with adapters the head is frozen
    gradient = 0 if weights.adapters else weights.vocab_size * D * compute
    lost = SMALL_PARTS + (SEVERAL_RANKS if device.num > 1 else 0)
    return MemoryPlan(
        masters=(trained + weights.given) * sizes.master,
        weights=computing,
        gradients=trained * sizes.master + in_transit,
        optimizer=trained * sizes.state,
        reference=share * (of_reference or 0),
        head=head._replace(fixed=head.fixed + gradient),
        kept_per_token=tokens.kept,
        backward_per_token=tokens.backward,
        scored_per_token=scored,
        has_adapters=weights.adapters > 0,
        made=int(tokens.fixed) if weights.adapters else 0,
        process=device.process,
        reserve=int(lost * device.memory),
    )


def _computed_with(weights: Weights, sizes: Sizes, device: Device) -> tuple[int, int]:
    """Bytes of weights in the compute dtype that are not the masters, and of gradients being
    reduced across devices."""
    compute = sizes.compute
    if weights.adapters:
        stored = weights.stored_bytes(compute)
        if device.num == 1:
            return stored, 0
        # one buffer for the all-reduce of all adapter gradients
        in_transit = weights.adapters * sizes.master
        if device.replicated:
            return stored, in_transit
        gathered = (weights.outside + 2 * weights.largest_block) * compute
        return -(-stored // device.num) + gathered, in_transit
    if device.num == 1:
        return 0 if compute == sizes.master else weights.total * compute, 0
    num_models = 1 if sizes.reference is None else 2
    # parameters outside of the blocks stay gathered until the end of the backward; of the blocks
    # one is gathered and the next one prefetched
    gathered = (num_models * weights.outside + 2 * weights.largest_block) * compute
    # a block's gradients, and their float32 copy during the reduce-scatter
    return gathered, weights.largest_block * (compute + 4)


def communicated_bytes(
    weights: Weights, sizes: Sizes, device: Device, *, num_micro_batches: int
) -> int:
    """Bytes that a device sends in an optimizer step.

    Sharded weights are all-gathered for every forward and, unless they stay gathered, every
    backward; gradients are reduce-scattered in float32. With adapters only their gradients are
    all-reduced, once per step.

    Args:
        weights, sizes, device: See `plan_memory`.
        num_micro_batches: Micro-batches per device and step.
    """
    num_forwards = 1 if sizes.reference is None else 2
    gathered = (num_forwards + 1) * (weights.total - weights.outside)
    if not weights.adapters:
        gathered += num_forwards * weights.outside
        of_micro_batch, of_step = gathered * sizes.compute + weights.total * 4, 0
    else:
        # policy and reference are one model: its parameters outside of blocks are gathered once
        gathered += weights.outside
        of_micro_batch = 0 if device.replicated else gathered * sizes.compute
        # an all-reduce is a reduce-scatter and an all-gather
        of_step = 2 * weights.adapters * sizes.master
    return (of_micro_batch * num_micro_batches + of_step) * (device.num - 1) // device.num
