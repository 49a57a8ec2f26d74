"""The ops on LM heads as torch knows them: one registration of forward, fake, backward and context.

Registered, so that torch.compile sees one call and never the tiles behind it. The version in an
op's name is raised with its meaning: compiled code is cached under it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

from fastpref_kernels.checks import check_target_range
from fastpref_kernels.dispatch import implementation
from fastpref_kernels.head import Head, Targets
from fastpref_kernels.row_sums import JointStats, TokenStats, ValueStats


class HeadOp(NamedTuple):
    """What sets one op apart from the others."""

    stats: type[TokenStats] | type[JointStats] | type[ValueStats]
    """Tensors that its forward returns."""
    differentiable: tuple[str, ...]
    """Those of them that gradients flow through."""
    num_models: int
    """1, or 2 for policy and reference."""
    has_direction: bool = False


OPS = {
    "token_logps": HeadOp(TokenStats, ("logps",), 1),
    "token_logps_kl": HeadOp(JointStats, ("logps", "kl"), 2, has_direction=True),
    "tdpo1_token_values": HeadOp(ValueStats, ("values",), 2),
}


@contextmanager
def inside_op(device: torch.device) -> Iterator[None]:
    """Where an op's tensors are: kernels launch there, and autocast keeps out of its products."""
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
        op: Its name.
        heads: Of the policy and, where the op takes two, of the reference.
        target: Token ids, (N,).
        direction: Of the KL, where the op has one.
        ignore_index: Target of rows that are not scored.

    Returns:
        The op's stats; gradients of the differentiable ones flow to the policy's head.
    """
    policy, reference = heads[0], heads[-1]
    leaves = (policy.input, policy.weight, policy.bias)
    frozen: tuple[Tensor | None, ...] = (None,) * 3
    if len(heads) == 2:
        of_reference = (reference.input, reference.weight, reference.bias)
        frozen = tuple(x if x is None else x.detach() for x in of_reference)
    needs_grad = [
        torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves
    ]
    options = (direction, policy.scale, policy.softcap, ignore_index, needs_grad)
    return OPS[op].stats(*head_fwd(op, *leaves, *frozen, target, *options))


@custom_op("fastpref::head_v1", mutates_args=())
def head_fwd(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_input: Tensor | None,
    reference_weight: Tensor | None,
    reference_bias: Tensor | None,
    target: Tensor,
    direction: str,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    needs_grad: list[bool],
) -> list[Tensor]:
    """The op's stats."""
    check_target_range(target, ignore_index, weight.shape[0])
    call = _Call.of(
        op,
        (input, weight, bias, reference_input, reference_weight, reference_bias),
        (direction, scale, softcap, needs_grad),
    )
    with inside_op(input.device):
        return list(call.forward(Targets.of(target, ignore_index)))


@head_fwd.register_fake
def _(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    *of_reference, _, direction, scale, softcap, _, needs_grad = rest
    options = (direction, scale, softcap, needs_grad)
    return list(_Call.of(op, (input, weight, bias, *of_reference), options).empty_stats())


@custom_op("fastpref::head_bwd_v1", mutates_args=())
def head_bwd(
    op: str,
    grads: list[Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_input: Tensor | None,
    reference_weight: Tensor | None,
    reference_bias: Tensor | None,
    target: Tensor,
    stats: list[Tensor],
    direction: str,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    mode: str,
    needs_grad: list[bool],
) -> list[Tensor]:
    """Those gradients of the policy's input, weight and bias that are needed."""
    call = _Call.of(
        op,
        (input, weight, bias, reference_input, reference_weight, reference_bias),
        (direction, scale, softcap, needs_grad),
        mode,
    )
    with inside_op(input.device):
        gradients = call.backward(grads, Targets.of(target, ignore_index), stats)
    return [gradient for gradient in gradients if gradient is not None]


@head_bwd.register_fake
def _(
    op: str,
    grads: list[Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    leaves = zip((input, weight, bias), rest[-1], strict=True)
    return [leaf.new_empty(leaf.shape) for leaf, needed in leaves if needed and leaf is not None]


class _Call(NamedTuple):
    """An op, the heads it is called on, and the mode that both its passes are computed in."""

    op: str
    heads: tuple[Head, ...]
    direction: str
    mode: str
    needs_grad: tuple[bool, ...]

    @classmethod
    def of(
        cls,
        op: str,
        of_models: Sequence[Tensor | None],
        options: tuple[str, float, float | None, list[bool]],
        mode: str | None = None,
    ) -> "_Call":
        """From the flat arguments of a registered op; `mode` is chosen where it is not given."""
        direction, scale, softcap, needs_grad = options
        starts = range(0, 3 * OPS[op].num_models, 3)
        heads = tuple(_head(of_models[i : i + 3], scale, softcap) for i in starts)
        call = cls(op, heads, direction, mode or "", tuple(needs_grad))
        return call if mode else call._replace(mode=call._impl.choose_mode(*call._who))

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

    def forward(self, targets: Targets) -> Sequence[Tensor]:
        function = getattr(self._impl, f"{self.op}_fwd")
        return function(self._models, targets, mode=self.mode, **self._options)

    def backward(
        self, grads: list[Tensor], targets: Targets, stats: list[Tensor]
    ) -> Sequence[Tensor | None]:
        function = getattr(self._impl, f"{self.op}_bwd")
        return function(
            tuple(grads) if len(grads) > 1 else grads[0],
            self._models,
            targets,
            OPS[self.op].stats(*stats),
            mode=self.mode,
            needs_grad=self.needs_grad,
            **self._options,
        )


def _head(of_model: Sequence[Tensor | None], scale: float, softcap: float | None) -> Head:
    input, weight, bias = of_model
    assert input is not None and weight is not None
    return Head(input, weight, bias, scale, softcap)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    op, *of_models, target, direction, scale, softcap, ignore_index, needs_grad = inputs
    ctx.op, ctx.options = op, (direction, scale, softcap, ignore_index)
    ctx.mode = _Call.of(op, of_models, (direction, scale, softcap, needs_grad)).mode
    ctx.needs_grad = needs_grad
    ctx.save_for_backward(*of_models, target, *output)
    stats = OPS[op].stats(*output)
    flowing = [getattr(stats, name) for name in OPS[op].differentiable]
    ctx.mark_non_differentiable(*(x for x in stats if all(x is not y for y in flowing)))
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    # read once: activation checkpointing recomputes them once
    saved = ctx.saved_tensors
    of_models, target, stats = saved[:6], saved[6], list(saved[7:])
    op, mode = ctx.op, ctx.mode
    of_stats = dict(zip(OPS[op].stats._fields, grads, strict=True))
    upstream = [of_stats[name] for name in OPS[op].differentiable]
    nothing: tuple[None, ...] = (None,) * 13
    if all(grad is None for grad in upstream):
        return nothing
    if op == "token_logps_kl" and of_stats["kl"] is None:
        # the KL was only looked at: the reference's logits are not needed again
        op, mode, upstream = "token_logps", "lean", upstream[:1]
        stats = [*stats[:2], stats[0].new_empty(0), stats[0].new_empty(0)]
    present = [grad for grad in upstream if grad is not None]
    filled = [torch.zeros_like(present[0]) if grad is None else grad for grad in upstream]
    gradients = iter(
        head_bwd(op, filled, *of_models, target, stats, *ctx.options, mode, ctx.needs_grad)
    )
    leaves = [next(gradients) if needed else None for needed in ctx.needs_grad]
    return (None, *leaves, *nothing[4:])


register_autograd("fastpref::head_v1", _differentiate, setup_context=_setup_context)
