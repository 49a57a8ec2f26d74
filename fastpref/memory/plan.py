"""The memory plan of a run: what every GPU will hold, by what it is."""

from dataclasses import dataclass
from typing import NamedTuple

from fastpref.memory.count import TokenBytes, Weights

GIB = 2**30
SMALL_PARTS = 0.03
"""Share of a device's memory that is lost between blocks of the allocator, and to what runs beside
training."""
SEVERAL_RANKS = 0.03
"""The same for buffers of collectives, and because a rank that runs out of memory among others ends
the run."""


class Sizes(NamedTuple):
    """Bytes of a number, by what it is of."""

    master: int
    """A weight as it is trained."""
    compute: int
    """A weight as it is computed with."""
    state: int
    """What the optimizer keeps of a weight."""
    reference: int | None
    """A weight of the reference as it is stored; 0 where it is the policy without its adapters,
    None without a reference."""


class HeadBytes(NamedTuple):
    """What the fused head takes beside its inputs and results, bytes."""

    fixed: int
    per_token: int = 0
    """Exponentials that a forward keeps for its backward, of as many tokens as fit."""
    limit: int = 0
    """Of all exponentials."""

    def of(self, num_tokens: float) -> float:
        """For so many tokens, all of them scored."""
        return self.fixed + min(self.per_token * num_tokens, self.limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What one GPU holds in training, bytes."""

    masters: int
    """Weights as they are trained, this GPU's share of them; of adapters all."""
    weights: int
    """Weights as they are computed with: all of them on one GPU, 0 where they are the masters;
    on several GPUs what is gathered at once, of policy and reference. Beside adapters the frozen
    model, and what is gathered of it where it is sharded."""
    gradients: int
    """This GPU's share, and on several GPUs those on their way to the others."""
    optimizer: int
    reference: int
    head: HeadBytes
    """Of the fused head, and the gradient of its weight."""
    kept_per_token: float
    """Activations kept from a token's forward to its backward."""
    backward_per_token: float
    """What the backward of a block takes beside that."""
    scored_per_token: float
    """What the head takes for a token that is scored, its backward included."""
    has_adapters: bool
    """They are what is trained."""
    made: int
    """What adapters make of weights while they compute: of an expert's matrices whole ones."""
    process: int
    """Of a CPU: what the program takes beside tensors."""
    reserve: int
    """Never used."""

    @property
    def fixed(self) -> int:
        """What is there however many tokens are computed at once."""
        of_weights = self.masters + self.weights + self.gradients + self.optimizer
        return of_weights + self.made + self.reference + self.process

    def peak(self, num_tokens: float) -> int:
        """The most that is used at once, the reserve left out.

        Args:
            num_tokens: Computed at once, every one of them scored.
        """
        head = self.head.of(num_tokens) + self.scored_per_token * num_tokens
        body = self.backward_per_token * num_tokens
        return int(self.fixed + self.kept_per_token * num_tokens + max(head, body))

    def most_tokens(self, available: int) -> int:
        """Tokens that can be computed at once where so many bytes are available, >= 0."""
        spare = available - self.reserve - self.fixed
        per_token, head = self.kept_per_token + self.scored_per_token, self.head
        # with exponentials of all tokens, or of more than are kept
        with_head = max(
            (spare - head.fixed) / (per_token + head.per_token),
            (spare - head.fixed - head.limit) / per_token,
        )
        in_body = spare / (self.kept_per_token + self.backward_per_token)
        return max(0, int(min(with_head, in_body)))

    def parts(self) -> dict[str, int]:
        """What is fixed, by its name."""
        fields = {"masters": self.masters, "weights": self.weights}
        if self.has_adapters:
            fields = {"adapters": self.masters, "base": self.weights, "made of both": self.made}
        rest = ("gradients", "optimizer", "reference", "process")
        return fields | {name: getattr(self, name) for name in rest}


class Device(NamedTuple):
    """What a model is trained on."""

    type: str
    """cuda or cpu."""
    num: int
    """Devices that train together; on several the model is sharded, unless it is replicated."""
    memory: int
    """Bytes of each."""
    process: int = 0
    """Bytes that are taken on a CPU before there is a model."""
    replicated: bool = False
    """Every device has the whole of a model that is frozen beside adapters."""


def plan_memory(
    weights: Weights,
    tokens: TokenBytes,
    sizes: Sizes,
    device: Device,
    *,
    head: HeadBytes,
) -> MemoryPlan:
    """What training takes of every device.

    Args:
        head: Of it, the gradient of its weight left out.
    """
    trained = weights.adapters or -(-weights.total // device.num)
    share, D = -(-weights.total // device.num), weights.hidden_size
    compute, of_reference = sizes.compute, sizes.reference
    computing, in_transit = _computed_with(weights, sizes, device)
    # states, their gradient in float32 and in their own dtype, a copy without padding
    scored = D * (3 * compute + 4)
    if of_reference is not None:
        scored += D * compute
    # beside adapters the head is frozen
    gradient = 0 if weights.adapters else weights.vocab_size * D * compute
    lost = SMALL_PARTS + (SEVERAL_RANKS if device.num > 1 else 0)
    return MemoryPlan(
        masters=trained * sizes.master,
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
    """Bytes of the weights that are computed with and are no masters, and of gradients that are on
    their way to other devices."""
    compute = sizes.compute
    if weights.adapters:
        stored = weights.stored_bytes(compute)
        if device.num == 1:
            return stored, 0
        # one buffer for all gradients while they are summed over GPUs
        in_transit = weights.adapters * sizes.master
        if device.replicated:
            return stored, in_transit
        gathered = (weights.outside + 2 * weights.largest_block) * compute
        return -(-stored // device.num) + gathered, in_transit
    if device.num == 1:
        return 0 if compute == sizes.master else weights.total * compute, 0
    num_models = 1 if sizes.reference is None else 2
    # all but the blocks stays gathered from the forward to the end of the backward; of blocks
    # one is computed with while the next one comes
    gathered = (num_models * weights.outside + 2 * weights.largest_block) * compute
    # a block's gradients, and the same in float32 while they are summed over GPUs
    return gathered, weights.largest_block * (compute + 4)


def communicated_bytes(
    weights: Weights, sizes: Sizes, device: Device, *, num_micro_batches: int
) -> int:
    """What a GPU sends in an optimizer step, bytes.

    Of what is sharded, weights for every forward and, but for what stays gathered, every backward,
    and gradients, summed in float32; of adapters their gradients alone, once a step.

    Args:
        weights, sizes, device: See `plan_memory`.
        num_micro_batches: Of a step and GPU.
    """
    num_forwards = 1 if sizes.reference is None else 2
    gathered = (num_forwards + 1) * (weights.total - weights.outside)
    if not weights.adapters:
        gathered += num_forwards * weights.outside
        of_micro_batch, of_step = gathered * sizes.compute + weights.total * 4, 0
    else:
        # policy and reference are one model, whose outside is gathered until both are computed
        gathered += weights.outside
        of_micro_batch = 0 if device.replicated else gathered * sizes.compute
        # added up, then handed out
        of_step = 2 * weights.adapters * sizes.master
    return (of_micro_batch * num_micro_batches + of_step) * (device.num - 1) // device.num
