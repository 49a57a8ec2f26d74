"""A model is accepted or refused for what it computes, in whatever dtype it is stored."""

import pickle

import pytest
import torch
from tiny_models import FAMILIES, build_family, build_model
from torch import Tensor, nn

from fastpref.errors import CheckpointError, ConfigError, NonFiniteError
from fastpref.model.checks import check_model, check_repeatability
from fastpref.model.loading import keep_weights
from fastpref.model.scorer import TokenScorer

DTYPES = [torch.float32, torch.bfloat16]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class NoisyLayer(nn.Linear):
    """Draws random numbers in training mode, or always."""

    always = False

    def forward(self, hidden: Tensor) -> Tensor:
        noise = torch.rand_like(hidden) if self.training or self.always else 0.5
        return super().forward(hidden * (1 + 0.01 * (noise - 0.5)))


def add_noise(model: nn.Module, *, always: bool) -> None:
    layer = model.model.layers[1].mlp.up_proj
    noisy = NoisyLayer(layer.in_features, layer.out_features, bias=False)
    noisy.weight, noisy.always = layer.weight, always
    model.model.layers[1].mlp.up_proj = noisy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_and_is_left_as_it_was(family, dtype):
    model = build_model(family).to(dtype)
    ids = torch.tensor([[3, 4, 5, 6]])
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = model.eval()(input_ids=ids).logits
    random_state = torch.random.get_rng_state()
    findings = check_model(model, dtype)
    assert findings.repeats_exactly and not findings.rounds_buffers
    assert pickle.loads(pickle.dumps(findings)) == findings
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_noise_of_training_mode_under_any_name_is_off_while_a_policy_trains():
    model = build_model("llama", attention_dropout=0.5)
    add_noise(model, always=False)
    ids = torch.tensor([[3, 4, 5, 6]])
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    scorer = TokenScorer(model).train()
    assert check_repeatability(model)
    assert not any(module.training for module in scorer.modules())
    # what it is exported with
    assert model.config.attention_dropout == 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_that_is_always_there_is_refused_with_the_layer_it_comes_from(dtype):
    model = build_model("llama").to(dtype)
    add_noise(model, always=True)
    with pytest.raises(ConfigError, match=r"differently each time.*layers\.1\.mlp\.up_proj"):
        check_model(model, dtype)


RWKV = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 4, "rescale_every": 2}


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_a_model_changes_itself_are_not_trained(dtype):
    model = build_family("rwkv", **RWKV).to(dtype)
    with pytest.raises(ConfigError, match="changes its own weights"):
        check_model(model, dtype)
    model = build_family("rwkv", **RWKV).to(dtype)
    weight = model.rwkv.blocks[3].attention.output.weight.clone()
    keep_weights(model)
    check_model(model, dtype)
    assert torch.equal(model.rwkv.blocks[3].attention.output.weight, weight)
    assert model.config.rescale_every == 2


class GradModeLayer(nn.Linear):
    """Takes another way while gradients are recorded."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * (1.01 if torch.is_grad_enabled() else 1)


def test_another_way_with_gradients_than_without_is_refused():
    model = build_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = GradModeLayer(32, 48, bias=False)
    model.model.layers[0].mlp.up_proj.weight = layer.weight
    with pytest.raises(ConfigError, match="policy and reference could not be compared"):
        check_model(model, torch.float32)


class Detached(nn.Embedding):
    """Lets no gradient through."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).detach()


def test_a_model_without_a_backward_is_refused_for_training_alone():
    model = build_model("llama")
    embedding = model.model.embed_tokens
    model.model.embed_tokens = Detached(97, 32)
    model.model.embed_tokens.weight = embedding.weight
    with pytest.raises(ConfigError, match=r"cannot be trained as it computes in evaluation mode"):
        check_model(model, torch.float32)
    check_model(model, torch.float32, trainable=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_that_looks_ahead_is_refused(dtype):
    # BERT's config says is_decoder=False unless somebody set it
    model = build_family("bert", **SIZES).to(dtype)
    with pytest.raises(ConfigError, match="BertLMHeadModel is no causal language model"):
        check_model(model, dtype)
    check_model(build_family("bert", **SIZES, is_decoder=True), torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_weights_that_are_not_finite_are_named(dtype, value):
    model = build_model("llama").to(dtype)
    # one number that no probe need meet
    model.model.embed_tokens.weight.data[50, 3] = value
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    with pytest.raises(CheckpointError, match=r"not finite.*embed_tokens.*layers\.1\.mlp\.up_proj"):
        check_model(model, dtype)


def test_what_overflows_in_float16_alone_is_said_to():
    model = build_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1e6)
    check_model(model, torch.float32)
    check_model(model, torch.bfloat16)
    with pytest.raises(NonFiniteError, match=r"fsdp_policy_mp.*overflows in float16"):
        check_model(model, torch.float16)


def test_a_float32_buffer_in_the_way_of_16_bits_is_rounded_with_the_parameters():
    # XGLM adds a table of positions, a buffer, to its embeddings
    model = build_family("xglm", d_model=32, ffn_dim=48, num_layers=2, attention_heads=4)
    assert model.model.embed_positions.weights.dtype == torch.float32
    assert not check_model(model, torch.float32).rounds_buffers
    assert check_model(model, torch.bfloat16).rounds_buffers
    assert model.model.embed_positions.weights.dtype == torch.bfloat16
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.dtype == torch.bfloat16


def test_buffers_that_were_rounded_before_this_cpu_lacks_an_operation_are_said_to_be():
    # a GPU has the operation, and the reference's buffers have to be rounded there as well
    model = build_family("xglm", d_model=32, ffn_dim=48, num_layers=2, attention_heads=4)
    table = model.model.embed_positions

    def lack(*_: object) -> None:
        if table.weights.dtype == torch.float16:
            raise NotImplementedError("not implemented for 'Half'")  # as torch does on such a CPU

    table.register_forward_pre_hook(lack)
    assert check_model(model, torch.float16).rounds_buffers
    assert table.weights.dtype == torch.float16
