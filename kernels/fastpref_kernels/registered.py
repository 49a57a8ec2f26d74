"""Registration of the LM-head ops with torch: forward, fake, backward and autograd context.

torch.compile sees a registered op as a single call and does not trace into its tiles. Compiled code
is cached by the op's name, so the version in it must be raised whenever the semantics change.

A model is passed as a list: hidden states (N, D), head weight (V, D) and, if the head has one, bias
(V,). An op without a reference gets an empty list for it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

from fastpref_kernels.checks import check_target_range, refuse_transforms
from fastpref_kernels.dispatch import implementation
from fastpref_kernels.head import Head, Targets
from fastpref_kernels.row_sums import JointStats, TokenStats, ValueStats
from fastpref_kernels.workspace import bounded_by, bytes_set


class HeadOp(NamedTuple):
    """Properties of one op."""

    public: str
    """Name of the public function in `fastpref_kernels`."""
    stats: type[TokenStats] | type[JointStats] | type[ValueStats]
    """Type of the forward's results."""
    differentiable: tuple[str, ...]
    """Fields of `stats` that gradients flow through."""
    returned: tuple[str, ...]
    """Fields of `stats` that the public function returns."""
    num_models: int
    """1, or 2 for policy and reference."""
    has_direction: bool = False


OPS = {
    "token_logps": HeadOp("token_logps", TokenStats, ("logps",), ("logps",), 1),
    "token_logps_kl": HeadOp(
        "token_logps_and_kl",
        JointStats,
        ("logps", "kl"),
        ("logps", "reference_logps", "kl"),
        2,
        has_direction=True,
    ),
    "tdpo1_token_values": HeadOp("tdpo1_token_values", ValueStats, ("values",), ("values",), 2),
}


@contextmanager
def inside_op(device: torch.device) -> Iterator[None]:
    """Make `device` current for kernel launches, and disable autocast."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def sweep_heads(
    op: str, heads: Sequence[Head], target: Tensor, *, direction: str = "", ignore_index: int
) -> Any:
    """Run an op of `OPS`.

    Args:
        op: Key in `OPS`.
        heads: Policy and, if the op takes two models, reference.
        target: Token ids, (N,).
        direction: Direction of the KL, if the op has one.
        ignore_index: Target of rows that are not scored.

    Returns:
        The op's stats; gradients flow from the differentiable ones to the policy's tensors.
    """
    policy, *references = heads
    frozen = [x.detach() for reference in references for x in _tensors(reference)]
    leaves = (policy.input, policy.weight, policy.bias)
    needs_grad = [
        torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves
    ]
    refuse_transforms(OPS[op].public)
    stats = head_fwd(
        _tensors(policy),
        frozen,
        target,
        sweep=op,
        direction=direction,
        scale=policy.scale,
        softcap=policy.softcap,
        ignore_index=ignore_index,
        needs_grad=needs_grad,
        workspace=bytes_set(),
    )
    return OPS[op].stats(*stats)


_ARGUMENTS = "Tensor[] policy, Tensor[] reference, Tensor target"
_OPTIONS = (
    "str sweep, str direction, float scale, float? softcap, int ignore_index, bool[] needs_grad, "
    "int workspace"
)
"""Keyword arguments of a call, see `_Call.of`. None may be named `op` or `ctx`: selective
checkpointing passes them on to its policy function, which has arguments of these names."""


@custom_op(
    "fastpref::head_v7", mutates_args=(), schema=f"({_ARGUMENTS}, *, {_OPTIONS}) -> Tensor[]"
)
def head_fwd(
    policy: list[Tensor], reference: list[Tensor], target: Tensor, **options: Any
) -> list[Tensor]:
    """Fields of the op's stats, in order."""
    check_target_range(target, options["ignore_index"], len(policy[1]))
    call = _Call.of(policy, reference, **options)
    with inside_op(target.device), bounded_by(options["workspace"]):
        return list(call.forward(target))


@head_fwd.register_fake
def _(
    policy: list[Tensor], reference: list[Tensor], target: Tensor, **options: Any
) -> list[Tensor]:
    with bounded_by(options["workspace"]):
        return list(_Call.of(policy, reference, **options).empty_stats())


@custom_op(
    "fastpref::head_bwd_v7",
    mutates_args=(),
    schema=f"(Tensor[] grads, {_ARGUMENTS}, Tensor[] stats, *, {_OPTIONS}, str mode) -> Tensor[]",
)
def head_bwd(
    grads: list[Tensor],
    policy: list[Tensor],
    reference: list[Tensor],
    target: Tensor,
    stats: list[Tensor],
    **options: Any,
) -> list[Tensor]:
    """Gradients of the policy's input, weight and bias, without those that are not required."""
    call = _Call.of(policy, reference, **options)
    with inside_op(target.device), bounded_by(options["workspace"]):
        gradients = call.backward(grads, target, stats)
    return [gradient for gradient in gradients if gradient is not None]


@head_bwd.register_fake
def _(
    grads: list[Tensor],
    policy: list[Tensor],
    reference: list[Tensor],
    target: Tensor,
    stats: list[Tensor],
    **options: Any,
) -> list[Tensor]:
    leaves = zip(policy, options["needs_grad"][: len(policy)], strict=True)
    return [leaf.new_empty(leaf.shape) for leaf, needed in leaves if needed]


class _Call(NamedTuple):
    """A call of an op: its heads, its options, and the mode of both forward and backward."""

    op: str
    heads: tuple[Head, ...]
    direction: str
    ignore_index: int
    needs_grad: tuple[bool, ...]
    mode: str

    @classmethod
    def of(
        cls,
        policy: list[Tensor],
        reference: list[Tensor],
        *,
        sweep: str,
        direction: str,
        scale: float,
        softcap: float | None,
        ignore_index: int,
        needs_grad: list[bool],
        workspace: int,
        mode: str | None = None,
    ) -> "_Call":
        """Build from a registered op's arguments; `mode` is chosen unless given."""
        models = (policy, reference)[: OPS[sweep].num_models]
        heads = tuple(_head(tensors, scale, softcap) for tensors in models)
        call = cls(sweep, heads, direction, ignore_index, tuple(needs_grad), mode or "")
        if mode:
            return call
        with bounded_by(workspace):
            return call._replace(mode=call._impl.choose_mode(*call._who))

    @property
    def _impl(self) -> ModuleType:
        return implementation(self.op, self.heads[0].input.device)

    @property
    def _models(self) -> Any:
        return self.heads if OPS[self.op].num_models == 2 else self.heads[0]

    @property
    def _who(self) -> tuple[Any, tuple[bool, ...]]:
        return self._models, self.needs_grad

    @property
    def _options(self) -> dict[str, str]:
        return {"direction": self.direction} if OPS[self.op].has_direction else {}

    def empty_stats(self) -> Sequence[Tensor]:
        return self._impl.empty_stats(self._models, self.mode)

    def forward(self, target: Tensor) -> Sequence[Tensor]:
        function = getattr(self._impl, f"{self.op}_fwd")
        targets = Targets.of(target, self.ignore_index)
        return function(self._models, targets, mode=self.mode, **self._options)

    def backward(
        self, grads: list[Tensor], target: Tensor, stats: list[Tensor]
    ) -> Sequence[Tensor | None]:
        function = getattr(self._impl, f"{self.op}_bwd")
        return function(
            tuple(grads) if len(grads) > 1 else grads[0],
            self._models,
            Targets.of(target, self.ignore_index),
            OPS[self.op].stats(*stats),
            mode=self.mode,
            needs_grad=self.needs_grad,
            **self._options,
        )


def _tensors(head: Head) -> list[Tensor]:
    """List of tensors that represents a model in a registered op's arguments."""
    return [head.input, head.weight] if head.bias is None else [head.input, head.weight, head.bias]


def _head(tensors: list[Tensor], scale: float, softcap: float | None) -> Head:
    """The inverse of `_tensors`."""
    input, weight, *biases = tensors
    return Head(input, weight, biases[0] if biases else None, scale, softcap)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: list[Tensor]
) -> None:
    policy, reference, target = inputs
    call = _Call.of(policy, reference, **keyword_only_inputs)
    ctx.options = keyword_only_inputs | {"mode": call.mode}
    ctx.num_tensors = (len(policy), len(reference))
    stats = OPS[call.op].stats(*output)
    # a copy of what the caller gets and may change in place, as in `logps[~mask] = 0`
    copies = {name: getattr(stats, name).clone() for name in OPS[call.op].returned}
    ctx.save_for_backward(*policy, *reference, target, *stats._replace(**copies))
    flowing = [getattr(stats, name) for name in OPS[call.op].differentiable]
    ctx.mark_non_differentiable(*(x for x in stats if all(x is not y for y in flowing)))
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grads: list[Tensor | None]
) -> tuple[list[Tensor | None], list[None], None]:
    # read only once: activation checkpointing allows a single access to recomputed tensors
    saved = iter(ctx.saved_tensors)
    policy, reference = (list(islice(saved, num)) for num in ctx.num_tensors)
    target, *stats = saved
    options = ctx.options
    op = OPS[options["sweep"]]
    of_stats = dict(zip(op.stats._fields, grads, strict=True))
    upstream = [of_stats[name] for name in op.differentiable]
    if all(grad is None for grad in upstream):
        return [None] * len(policy), [None] * len(reference), None
    if options["sweep"] == "token_logps_kl" and of_stats["kl"] is None:
        # the KL has no upstream gradient: only the policy's logits are recomputed
        options = options | {"sweep": "token_logps", "mode": "lean"}
        upstream = upstream[:1]
        stats = [*stats[:2], stats[0].new_empty(0), stats[0].new_empty(0)]
    present = [grad for grad in upstream if grad is not None]
    filled = [torch.zeros_like(present[0]) if grad is None else grad for grad in upstream]
    gradients = iter(head_bwd(filled, policy, reference, target, stats, **options))
    needs_grad = options["needs_grad"][: len(policy)]
    leaves = [next(gradients) if needed else None for needed in needs_grad]
    return leaves, [None] * len(reference), None


register_autograd("fastpref::head_v7", _differentiate, setup_context=_setup_context)


def differentiable_once(backward: str, name_of: Callable[[dict[str, Any]], str]) -> None:
    """Make double backward through a registered backward raise a readable error.

    Args:
        backward: Registered name of the backward.
        name_of: Keyword arguments of a call of the backward -> name of the public op.
    """

    def remember_op(
        ctx: Any, inputs: Any, output: Any, keyword_only_inputs: dict[str, Any] | None = None
    ) -> None:
        ctx.op = name_of(keyword_only_inputs or {})

    def differentiate_twice(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"fastpref_kernels.{ctx.op} is differentiable once: its gradient has no gradient; call "
            "torch.autograd.grad without create_graph, or the definition in fastpref_kernels.naive"
        )

    register_autograd(backward, differentiate_twice, setup_context=remember_op)


differentiable_once("fastpref::head_bwd_v7", lambda options: OPS[options["sweep"]].public)
