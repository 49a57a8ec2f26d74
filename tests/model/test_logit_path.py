"""What lies between a body and its logits is measured, in 16 bits as in 32, and the scores tell."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import build_family, build_model, random_rows
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastpref.batches.padded import pad_rows
from fastpref.errors import ConfigError, NonFiniteError
from fastpref.model.exact_arithmetic import exact_arithmetic
from fastpref.model.logit_path import last_hidden_states, measure_logit_path
from fastpref.model.scorer import TokenScorer

DTYPES = [torch.float32, torch.bfloat16]


def with_logits(
    after: Callable[[Tensor], Tensor], before: Callable[[Tensor], Tensor] = lambda hidden: hidden
) -> Any:
    """A Llama that does something to its hidden states before and to its logits after the head."""

    class Changed(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
            hidden = self.model(*args, **kwargs).last_hidden_state
            return CausalLMOutputWithPast(logits=after(self.lm_head(before(hidden))))

    model = build_model("llama")
    model.__class__ = Changed
    return model


def own_logps(model: Any, rows: list) -> Tensor:
    """Log-probabilities of the responses by the model's own logits, each sequence alone."""
    logps = []
    for prompt, response in [(r[0], r[1]) for r in rows] + [(r[0], r[2]) for r in rows]:
        logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0]
        logps_LV = F.log_softmax(logits.double(), -1)[len(prompt) - 1 : -1]
        logps.append(logps_LV.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(logps)


@torch.no_grad()
def assert_scores_are_its_own(model: Any, dtype: torch.dtype) -> None:
    """In float32 arithmetic on weights stored in a dtype: ours against the family's logits."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    # a cut vocabulary has room for these
    rows = random_rows(vocab_size=80)
    scorer = TokenScorer(model)
    with exact_arithmetic(model):
        expected_N = own_logps(model, rows)
        logps_N = scorer(pad_rows(rows, pad_token_id=0))
    torch.testing.assert_close(logps_N.double(), expected_N, rtol=1e-4, atol=1e-4)


FAMILIES = {
    # multiplied, divided, capped under four names, one of them for logits alone
    "cohere": ("cohere", {"logit_scale": 0.25}, {"scale": 0.25}),
    "granite": ("granite", {"logits_scaling": 3.0}, {"scale": 1 / 3.0}),
    "falcon_h1": (
        "falcon_h1",
        {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
        | {"mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 8},
        {"scale": 0.3},
    ),
    "gemma2": ("gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}, {"softcap": 3.0}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"logits_soft_cap": 3.0, "lru_width": 32, "num_hidden_layers": 3, "head_dim": 8},
        {"softcap": 3.0},
    ),
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_scale_or_softcap_is_found_whatever_it_is_called(name, dtype):
    model_type, config, expected = FAMILIES[name]
    model = build_family(model_type, **(SIZES | config))
    assert_scores_are_its_own(model, dtype)
    path = measure_logit_path(model)
    # to the last bit what the config says
    assert (path.scale, path.softcap, path.hidden_scale) == (
        expected.get("scale", 1.0),
        expected.get("softcap"),
        1.0,
    )


CHANGES = {
    "multiplied": (lambda z: z * 0.37, lambda h: h),
    "divided hidden states": (lambda z: z, lambda h: h / 7),
    "both, then capped": (lambda z: 5 * torch.tanh(2 * z / 5), lambda h: h * 0.3),
    "cut": (lambda z: z[..., :80], lambda h: h),
    "masked at the end": (
        lambda z: z.masked_fill(torch.arange(97) >= 90, torch.finfo(z.dtype).min),
        lambda h: h,
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", CHANGES)
def test_factors_caps_and_cuts_that_no_config_names_are_measured(change, dtype):
    assert_scores_are_its_own(with_logits(*CHANGES[change]), dtype)


def test_a_bias_is_scaled_by_what_follows_the_head_alone():
    model = with_logits(lambda z: z * 0.37, lambda h: h / 7)
    model.lm_head = nn.Linear(32, 97)
    nn.init.normal_(model.lm_head.bias)
    assert_scores_are_its_own(model, torch.float32)
    rows = random_rows()
    own_logps(model, rows).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    TokenScorer(model)(pad_rows(rows, pad_token_id=0)).sum().backward()
    for name in ("lm_head.weight", "lm_head.bias", "model.norm.weight"):
        torch.testing.assert_close(
            model.get_parameter(name).grad, expected[name], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_between_body_and_head_belong_to_what_is_computed(dtype):
    # a dense layer and a norm, as in all of BERT's kind
    model = build_family("bert", **SIZES, is_decoder=True)
    assert measure_logit_path(model).body == ""
    assert_scores_are_its_own(model, dtype)
    # the head is the model's own again
    assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 97)


def test_a_head_keeps_the_forward_that_an_adapter_gave_it():
    model = build_family("bert", **SIZES, is_decoder=True)
    head = model.get_output_embeddings()
    head.forward = own = partial(type(head).forward, head)
    last_hidden_states(model, "", input_ids=torch.tensor([[3, 4]]))
    assert head.forward is own


def test_a_body_that_goes_by_another_name_than_the_familys_is_found():
    # Llama 4 says its body is the whole model
    model = build_model("llama")
    model.base_model_prefix = "no_such_name"
    assert model.base_model is model
    assert measure_logit_path(model).body == "model"


class HeadOfItsOwn(nn.Linear):
    """Scales every token's logit by a number of its own."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * torch.linspace(1, 2, self.out_features)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("after", "says"),
    [
        (lambda z: z - z.logsumexp(-1, keepdim=True), "it makes"),
        (lambda z: z + torch.arange(97) / 1000, "for token"),
        (lambda z: z.index_fill(-1, torch.tensor([5]), -3e38), "for token 5"),
        (lambda z: 5 * torch.asinh(z / 5), "it makes"),
    ],
)
def test_what_is_no_scale_and_softcap_is_refused(after, says, dtype):
    model = with_logits(after).to(dtype)
    with pytest.raises(ConfigError, match=rf"more to its logits.*{says}"):
        measure_logit_path(model)


def test_a_head_that_is_no_linear_layer_is_refused():
    model = build_model("llama")
    model.lm_head = HeadOfItsOwn(32, 97, bias=False)
    with pytest.raises(ConfigError, match="HeadOfItsOwn, is more than a linear layer"):
        measure_logit_path(model)
    model.lm_head = nn.Identity()
    with pytest.raises(ConfigError, match="has no LM head with a weight"):
        measure_logit_path(model)


def test_a_familys_own_error_is_the_reason_of_a_refusal():
    model = with_logits(lambda z: z[:, :, None].unbind(9))
    with pytest.raises(ConfigError, match=r"does not compute rows of text: IndexError: Dim"):
        measure_logit_path(model)


def test_arithmetic_that_overflows_on_finite_weights_is_said_to():
    model = build_model("llama")
    model.lm_head.weight.data.fill_(3e38)
    with pytest.raises(NonFiniteError, match="in float32 and on finite weights"):
        measure_logit_path(model)
