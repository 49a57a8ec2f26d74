"""A Hugging Face causal LM as a scorer of tokens: body and LM head in one module, one forward.

The vocabulary logits are never built: the body's hidden states at the scored positions go straight
into the fused ops of `fastpref_kernels` with the head's weight. Body and head live in one module
because FSDP2 gathers the head's weight only inside the forward of the module that owns it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from fastpref_kernels import (
    TokenScores,
    tdpo1_token_values,
    token_logps,
    token_logps_and_kl,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from fastpref.attention import IMPLEMENTATION, packed_row
from fastpref.attention_kernels import PackedAttention
from fastpref.batch import PackedBatch
from fastpref.errors import ConfigError


@dataclass(frozen=True, slots=True)
class HeadStates:
    """What a model's LM head is applied to, for the joint sweep over policy and reference."""

    hidden: Tensor
    """(N, D) last hidden states at the scored positions, compute dtype."""
    weight: Tensor
    """(V, D) LM-head weight, gathered, compute dtype."""
    bias: Tensor | None
    """(V,) LM-head bias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitTransform:
    """What a model does to its logits after the linear head: z = cap · tanh(scale · z / cap)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitTransform":
        """Read off a transformers config: Cohere multiplies, Granite divides, Gemma caps."""
        scale = getattr(config, "logit_scale", None) or 1.0
        scale *= getattr(config, "lm_head_multiplier", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


class TokenScorer(nn.Module):
    """Log-probabilities of response tokens under a causal LM, and their KL to a reference.

    Args:
        model: Any causal LM of transformers whose logits are a linear head on the last hidden
            states, with an optional scale and softcap. `check_head` tells whether that holds.
        attention: What computes packed rows; None: every batch must be padded.
            `attention_choice` tells whether the model can.
    """

    def __init__(self, model: Any, attention: PackedAttention | None = None) -> None:
        super().__init__()
        self.model = model
        self.attention = attention
        if attention is not None:
            model.set_attn_implementation(IMPLEMENTATION)
        self.logit_transform = LogitTransform.of(model.config.get_text_config())

    @property
    def head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    @property
    def num_positions(self) -> int | None:
        """Longest sequence a position table allows (GPT-2, GPT-J, OPT); None without a table."""
        for module in self.model.modules():
            for name in ("wpe", "embed_positions"):
                table = getattr(module, name, None)
                if isinstance(table, nn.Embedding | Tensor):
                    return self.model.config.max_position_embeddings
        return None

    def hidden_states(self, batch: PackedBatch, longest: int = 0) -> Tensor:
        """Last hidden states at the positions that predict `batch.target`, shape (N, D).

        Args:
            batch: The micro-batch.
            longest: Tokens to allow for where the batch's own sequences are shorter.
        """
        rows: dict[str, Any] = {"attention_mask": batch.attention_mask}
        if batch.layout is not None:
            assert self.attention is not None, "a packed batch needs a packed attention"
            rows = packed_row(batch, self.attention, longest)
        output = self.model.base_model(input_ids=batch.input_ids, use_cache=False, **rows)
        return output.last_hidden_state.flatten(0, 1)[batch.score_index]

    def states(self, batch: PackedBatch) -> HeadStates:
        """Hidden states and head, for another model's joint sweep.

        Under FSDP2 the weight stays gathered until `release()`.
        """
        return HeadStates(self.hidden_states(batch), self.head.weight, self.head.bias)

    def release(self) -> None:
        """Free the gathered head; to be called once the backward that used `states` is done."""
        if isinstance(self, FSDPModule):
            self.reshard()

    def forward(
        self,
        batch: PackedBatch,
        reference: HeadStates | None = None,
        direction: str = "reference_policy",
    ) -> TokenScores | Tensor:
        """Score the batch's N response tokens.

        Args:
            batch: The micro-batch.
            reference: The reference's states on the same batch; asks for the KL as well.
            direction: "reference_policy" or "policy_reference", see `token_logps_and_kl`.

        Returns:
            Per-token log-probabilities (N,), float32, in nats; with a reference, TokenScores of
            log-probabilities, reference log-probabilities and KL.
        """
        hidden_ND = self.hidden_states(batch)
        head, logits = self.head, self.logit_transform
        if reference is None:
            return token_logps(
                hidden_ND,
                # of a model that is stored in 16 bits, where it is not under FSDP
                head.weight.to(hidden_ND.dtype),
                batch.target,
                linear_bias=None if head.bias is None else head.bias.to(hidden_ND.dtype),
                logit_scale=logits.scale,
                logit_softcap=logits.softcap,
            )
        return token_logps_and_kl(
            hidden_ND,
            head.weight,
            batch.target,
            reference.hidden,
            reference.weight,
            direction=direction,
            linear_bias=head.bias,
            reference_linear_bias=reference.bias,
            logit_scale=logits.scale,
            logit_softcap=logits.softcap,
        )

    def tdpo1_values(self, batch: PackedBatch, reference: HeadStates) -> Tensor:
        """Log-ratio plus KL of the batch's N response tokens, see `tdpo1_token_values`.

        Args:
            batch: The micro-batch.
            reference: The reference's states on the same batch.

        Returns:
            (N,) float32, in nats.
        """
        assert self.logit_transform.softcap is None
        return tdpo1_token_values(
            self.hidden_states(batch),
            self.head.weight,
            batch.target,
            reference.hidden,
            reference.weight,
            linear_bias=self.head.bias,
            reference_linear_bias=reference.bias,
            logit_scale=self.logit_transform.scale,
        )

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Sample continuations with transformers' own `generate`; prompts padded on the left.

        Args:
            input_ids, attention_mask: (B, L) int64.
            options: Passed on to `generate`.

        Returns:
            (B, L + new tokens) int64: prompts and continuations.
        """
        return self.model.generate(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **options
        )


@torch.no_grad()
def check_head(scorer: TokenScorer) -> None:
    """Hold the head's arithmetic to the model's own logits on four tokens.

    A family that treats its logits in a way `LogitTransform` does not know (a scale under another
    name, say) would train on wrong probabilities without a sign of it.

    Raises:
        ConfigError: the two differ.
    """
    device = scorer.head.weight.device
    ids = torch.arange(4, device=device)[None] % scorer.head.weight.shape[0]
    batch = PackedBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        score_index=torch.arange(4, device=device),
        target=ids[0],
        token_weights=None,
        sequence_ids=torch.zeros_like(ids[0]),
        num_sequences=1,
    )
    logps_N = scorer(batch)
    logits_NV = scorer.model(input_ids=ids, attention_mask=batch.attention_mask).logits[0]
    expected_N = F.log_softmax(logits_NV.float(), -1).gather(1, batch.target[:, None])[:, 0]
    # bf16 and fp16 logits are rounded to 3 digits before their softmax
    tolerance = 1e-3 if logits_NV.dtype == torch.float32 else 0.25
    if not torch.allclose(logps_N, expected_N, rtol=tolerance, atol=tolerance):
        worst = (logps_N - expected_N).abs().max().item()
        raise ConfigError(
            f"model.name_or_path: {type(scorer.model).__name__} does more to its logits than a "
            f"linear head, a scale and a softcap (log-probabilities differ by {worst:.3g} nats); "
            "this family is not supported"
        )
