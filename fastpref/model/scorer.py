"""A Hugging Face causal LM as a token scorer: body and LM head in one module and one forward.

The vocabulary logits are never built: the body's hidden states at the scored positions go straight
into the fused ops of `fastpref_kernels` with the head's weight. Body and head live in one module
because FSDP2 gathers the head's weight only inside the forward of the module that owns it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fastpref_kernels import (
    TokenScores,
    tdpo1_token_values,
    token_logps,
    token_logps_and_kl,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from transformers import GenerationConfig

from fastpref.batch import Batch
from fastpref.model.adapters.lora import Adapters
from fastpref.model.adapters.tied_head import adapted_head
from fastpref.model.attention.backends import PackedAttention
from fastpref.model.attention.interface import IMPLEMENTATION, packed_row
from fastpref.model.logit_path import LogitPath, last_hidden_states, measure_logit_path
from fastpref.model.masters import MasterWeights
from fastpref.model.mixers import Sequences, computing
from fastpref.model.positions import position_limit
from fastpref.model.rotary import keep_steady
from fastpref.model.router import RouterBalance, balance_left_out


@dataclass(frozen=True, slots=True)
class HeadStates:
    """Hidden states and LM head of one model, the inputs of the joint policy-reference ops."""

    hidden: Tensor
    """(M or more, D) last hidden states at `Batch.head_index`, compute dtype."""
    weight: Tensor
    """(V, D) LM-head weight, gathered, compute dtype."""
    bias: Tensor | None
    """(V,) LM-head bias."""


class TokenScorer(nn.Module):
    """Log-probabilities of response tokens under a causal LM, and their KL to a reference.

    Modules stay in evaluation mode even in training: a preference loss compares two models token
    by token, so whatever is random in training mode (dropout, router jitter, layer dropping) would
    be noise in every log-ratio.

    Args:
        model: Any causal LM of transformers whose logits are a linear head on the last hidden
            states, up to scales, a softcap and a cut vocabulary; `model/checks.py` verifies this.
        attention: Backend for packed rows; None: every batch must be padded.
            `model/attention/choice.py` finds out whether the model can be packed.
        path: From the last hidden states to the logits; None: measured, which needs the weights.
        adapters: Adapters in the model; if it is trained, only they are. None: no adapters.
        balance: The router's load-balancing loss, to be collected after each forward that records
            gradients; None: no such loss.
    """

    def __init__(
        self,
        model: Any,
        attention: PackedAttention | None = None,
        path: LogitPath | None = None,
        adapters: Adapters | None = None,
        balance: RouterBalance | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.adapters = adapters
        self.balance = balance
        self.attention = attention
        if attention is not None:
            model.set_attn_implementation(IMPLEMENTATION)
        self.path = measure_logit_path(model) if path is None else path
        self._masters: MasterWeights | None = None
        self.with_lists = _blocks_with_lists(model)
        """Blocks whose parameters all have gradients in every step, see `sum_gradients`."""
        keep_steady(model)
        # `generate` takes options that it is not given from here: limits, penalties, decoding
        model.generation_config = GenerationConfig()
        self.eval()

    def keep_masters(self, dtype: torch.dtype) -> None:
        """Compute in another dtype than that of the master weights; for one rank, after moving the
        model to its device.

        From each forward until `release()` the model holds a working copy of its parameters.
        """
        self._masters = MasterWeights(self.model, dtype)

    def follow(self, optimizer: Optimizer) -> None:
        """Call `refresh` after every step of an optimizer; to be called once."""
        optimizer.register_step_post_hook(lambda *_: self.refresh())

    def refresh(self) -> None:
        """Update all that is derived from the parameters, after they were changed in place."""
        if self._masters is not None:
            self._masters.refresh()
        if self.adapters is not None:
            self.adapters.forget_parts()

    def trained(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def sum_gradients(self) -> None:
        """Complete a step's gradients; to be called by every rank after the backward of its last
        micro-batch.

        In a block that holds modules in lists, an expert that no token chose has a gradient of
        zeros, as it has on several ranks; optimizers leave a parameter without a gradient as it is.
        Gradients of unsharded parameters (adapters) are all-reduced.
        """
        for block in self.with_lists:
            for parameter in block.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        if self.adapters is not None and dist.get_world_size() > 1:
            self.adapters.sum_gradients()

    def train(self, mode: bool = True) -> "TokenScorer":
        """Stay in evaluation mode, whatever `mode` is."""
        return super().train(False)

    @property
    def head(self) -> Any:
        """The LM head, a module with a weight (rows, D)."""
        return self.model.get_output_embeddings()

    @property
    def num_embeddings(self) -> int:
        """Rows of the input embedding; token ids must be below this number."""
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def num_positions(self) -> int | None:
        """Longest sequence, in tokens, that a position table allows; None without a table."""
        return position_limit(self.model)

    def hidden_states(self, batch: Batch, longest: int = 0) -> Tensor:
        """Last hidden states at the positions that predict `batch.head_target`, (M or more, D).

        Args:
            longest: Assumed length of the longest sequence, if greater than the batch's own.
        """
        rows: dict[str, Any] = {"attention_mask": batch.attention_mask}
        sequences = None
        if batch.layout is not None:
            assert self.attention is not None, "a packed batch needs a packed attention"
            rows = packed_row(batch, self.attention, longest)
            sequences = Sequences(batch.layout)
        compute = last_hidden_states
        if self.balance is not None and torch.is_grad_enabled():
            compute = self.balance.last_hidden_states
        with computing(sequences):
            hidden_BLD = compute(self.model, self.path.body, input_ids=batch.input_ids, **rows)
        return hidden_BLD.flatten(0, 1)[batch.head_index]

    def states(self, batch: Batch) -> HeadStates:
        """Hidden states and LM head, the reference input of another model's `forward`.

        Under FSDP2 the weight stays gathered until `release()`.
        """
        return self._states(batch)

    # not `states`, which FSDP2 wraps in its hooks: `forward` runs inside them already
    def _states(self, batch: Batch) -> HeadStates:
        self._lend_masters()
        hidden_MD = self.hidden_states(batch)
        head, V = self.head, self.path.vocab_size
        hidden_MD, weight = adapted_head(head, hidden_MD)
        bias = getattr(head, "bias", None)
        if weight.shape[0] > V:
            weight, bias = weight[:V], None if bias is None else bias[:V]
        if bias is not None and self.path.hidden_scale != 1:
            # the ops apply `hidden_scale` to the head's whole output, bias included
            bias = bias / self.path.hidden_scale
        # a frozen model may be stored in 16 bits and compute in float32
        dtype = hidden_MD.dtype
        return HeadStates(hidden_MD, weight.to(dtype), None if bias is None else bias.to(dtype))

    @property
    def _logit_scale(self) -> float:
        return self.path.hidden_scale * self.path.scale

    def release(self) -> None:
        """Free the gathered head and restore the master weights; to be called after the backward,
        or after a forward that has none."""
        if isinstance(self, FSDPModule):
            self.reshard()
        if self._masters is not None:
            self._masters.take_back()
        if self.balance is not None:
            self.balance.forget()

    def forget_gradients(self) -> None:
        """Drop the gradients that a failed backward left in parameters and in their copy."""
        self.zero_grad()
        if self._masters is not None:
            self._masters.forget_gradients()

    def _lend_masters(self) -> None:
        if self._masters is not None:
            self._masters.lend()

    def forward(
        self,
        batch: Batch,
        reference: HeadStates | None = None,
        direction: str = "reference_policy",
    ) -> TokenScores | Tensor:
        """Score the batch's N response tokens.

        Args:
            reference: The reference's states on the same batch; if given, the KL is computed too.
            direction: "reference_policy" or "policy_reference", see `token_logps_and_kl`.

        Returns:
            Per-token log-probabilities (N,), float32, in nats; with a reference, TokenScores of
            log-probabilities, reference log-probabilities and KL.
        """
        states, target = self._states(batch), batch.head_target
        hidden_MD, weight, bias = states.hidden, states.weight, states.bias
        if reference is None:
            logps = token_logps(
                hidden_MD,
                weight,
                target,
                linear_bias=bias,
                logit_scale=self._logit_scale,
                logit_softcap=self.path.softcap,
            )
            return batch.of_scored(logps)
        scores = token_logps_and_kl(
            hidden_MD,
            weight,
            target,
            reference.hidden,
            reference.weight,
            direction=direction,
            linear_bias=bias,
            reference_linear_bias=reference.bias,
            logit_scale=self._logit_scale,
            logit_softcap=self.path.softcap,
        )
        return TokenScores(*(batch.of_scored(values) for values in scores if values is not None))

    def tdpo1_values(self, batch: Batch, reference: HeadStates) -> Tensor:
        """Log-ratio plus KL of the batch's N response tokens, see `tdpo1_token_values`.

        Returns:
            (N,) float32, in nats.
        """
        assert self.path.softcap is None
        states = self._states(batch)
        values = tdpo1_token_values(
            states.hidden,
            states.weight,
            batch.head_target,
            reference.hidden,
            reference.weight,
            linear_bias=states.bias,
            reference_linear_bias=reference.bias,
            logit_scale=self._logit_scale,
        )
        return batch.of_scored(values)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Sample continuations with transformers' own `generate`; prompts padded on the left.

        The checkpoint's generation config is ignored.

        Args:
            input_ids, attention_mask: (B, L) int64.
            options: Passed on to `generate`.

        Returns:
            (B, L + new tokens) int64: prompts and continuations.
        """
        self._lend_masters()
        # the KV cache grows with every token, and blocks may be compiled for each length
        eager = torch.compiler.set_stance("force_eager")
        try:
            with eager, balance_left_out(self.model):
                return self.model.generate(
                    input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **options
                )
        finally:
            self.release()


def _blocks_with_lists(model: nn.Module) -> set[nn.Module]:
    """Blocks that hold modules in a list or dict, such as experts: a token may use only some."""
    kinds = (nn.ModuleList, nn.ModuleDict)
    return {
        block
        for blocks in model.modules()
        if isinstance(blocks, kinds)
        for block in blocks.children()
        if any(isinstance(module, kinds) for module in block.modules())
    }
