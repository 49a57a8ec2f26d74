"""Sharding, recomputation and compilation leave the numbers as they are."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from tiny_models import build_family, build_model, random_rows
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.models.llama import modeling_llama

from fastpref.batches.padded import pad_rows
from fastpref.config import AdapterConfig, Config, DPOConfig, ModelConfig, PackingConfig
from fastpref.distributed import init_world
from fastpref.errors import ConfigError
from fastpref.model.checks import check_lists
from fastpref.model.logit_path import measure_logit_path
from fastpref.model.pair import build_pair
from fastpref.model.parallelize import parallelize, wrap_blocks
from fastpref.model.scorer import TokenScorer


@pytest.fixture(scope="module")
def mesh():
    world = init_world()
    yield world.mesh
    dist.destroy_process_group()


def scored(scorer, batch):
    """Scores, gradients of the parameters, and the bytes that autograd keeps for them."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores_N = scorer(batch)
    scores_N.sum().backward()
    grads = {
        name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
        for name, p in scorer.named_parameters()
        if p.grad is not None
    }
    return scores_N.detach(), grads, sum(kept.values())


LLAMA_MLP = modeling_llama.LlamaMLP
MAMBA = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
MODELS = {
    "llama": lambda: build_model("llama tied", num_hidden_layers=4, attention_dropout=0.5),
    "gpt2": lambda: build_model("gpt2"),
    # blocks within blocks, and layers that transformers cannot checkpoint
    "mamba": lambda: build_family("mamba", **MAMBA),
    "ctrl": lambda: build_family("ctrl", n_embd=32, dff=48, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_blocks_give_the_same_bits_and_keep_less(name, mesh):
    batch = pad_rows(random_rows(), pad_token_id=0)
    plain = scored(TokenScorer(MODELS[name]()), batch)
    kept = {}
    for recompute in (False, True):
        scorer = TokenScorer(MODELS[name]())
        wrap_blocks(scorer.model, activation_checkpointing=recompute)
        parallelize(scorer, mesh, compute_dtype=torch.float32)
        scores_N, grads, kept[recompute] = scored(scorer, batch)
        assert torch.equal(scores_N, plain[0])
        for key, grad in plain[1].items():
            torch.testing.assert_close(grads[key], grad, rtol=1e-6, atol=1e-6, msg=key)
    assert kept[True] < 0.7 * kept[False]


def test_a_block_is_computed_twice_in_evaluation_mode(mesh):
    scorer = TokenScorer(build_model("llama", attention_dropout=0.5))
    modes = []
    for layer in scorer.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    wrap_blocks(scorer.model, activation_checkpointing=True)
    parallelize(scorer, mesh, compute_dtype=torch.float32)
    # what others call before they train
    scorer.train()
    scorer(pad_rows(random_rows(), pad_token_id=0)).sum().backward()
    assert modes == [False] * 4


def test_parameters_shared_by_two_layers_are_trained_once(mesh):
    def build():
        model = build_model("llama", num_hidden_layers=4)
        layers = model.model.layers
        layers[3].mlp = layers[1].mlp
        return TokenScorer(model)

    batch = pad_rows(random_rows(), pad_token_id=0)
    _, expected, _ = scored(build(), batch)
    sharded = parallelize(build(), mesh, compute_dtype=torch.float32)
    _, grads, _ = scored(sharded, batch)
    assert set(grads) == set(expected)
    for key, grad in expected.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-6, atol=1e-6, msg=key)


def test_a_parameter_that_its_family_freezes_is_not_trained(mesh):
    # HRM's initial state
    scorer = TokenScorer(build_model("llama"))
    frozen = "model.model.norm.weight"
    scorer.get_parameter(frozen).requires_grad_(False)
    parallelize(scorer, mesh, compute_dtype=torch.float32)
    _, grads, _ = scored(scorer, pad_rows(random_rows(), pad_token_id=0))
    assert {name for name, _ in scorer.named_parameters()} - grads.keys() == {frozen}


class ListedExperts(nn.Module):
    """A mixture of experts as models with code of their own have it: an expert is called only where
    a token chose it."""

    def __init__(self, mlp: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(mlp) for _ in range(num_experts))
        self.router = nn.Linear(32, num_experts)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        hidden_TD = hidden_BLD.flatten(0, 1)
        weights_T, chosen_T = self.router(hidden_TD).softmax(-1).max(-1)
        output_TD = torch.zeros_like(hidden_TD)
        for index in chosen_T.unique().tolist():
            tokens = chosen_T == index
            output_TD[tokens] = self.experts[index](hidden_TD[tokens]) * weights_T[tokens, None]
        return output_TD.view_as(hidden_BLD)


def build_with_listed_experts(num_layers: int = 1) -> TokenScorer:
    """The experts are in the first layer."""
    model = build_model("llama", num_hidden_layers=num_layers)
    layer = model.model.layers[0]
    layer.mlp = ListedExperts(layer.mlp, num_experts=16)
    return TokenScorer(model)


def test_a_parameter_that_no_token_can_reach_is_left_as_it_is():
    scorer = build_with_listed_experts(num_layers=2)
    # a layer that chooses tokens, such as DeepSeek V3.2's indexer, gets no gradient
    scorer.model.model.layers[1].indexer = nn.Linear(32, 4, bias=False)
    scorer(pad_rows(random_rows()[:1], pad_token_id=0)).sum().backward()
    scorer.sum_gradients()
    grads = {name: parameter.grad for name, parameter in scorer.named_parameters()}
    unreached = {name for name, grad in grads.items() if grad is None}
    assert unreached == {"model.model.layers.1.indexer.weight"}
    zero = {name for name in grads.keys() - unreached if not grads[name].any()}
    assert zero and all(".experts." in name for name in zero)


def save_gradients_of_two_ranks(path: Path) -> None:
    world = init_world()
    scorer = parallelize(build_with_listed_experts(), world.mesh, compute_dtype=torch.float32)
    batch = pad_rows([random_rows()[world.rank]], pad_token_id=0)
    for _ in range(2):
        scorer(batch).sum().backward()
    scorer.sum_gradients()
    grads = {name: p.grad.full_tensor() for name, p in scorer.named_parameters()}
    if world.is_main:
        torch.save(grads, path)
    dist.destroy_process_group()


@pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="needs torch 2.13"
)
def test_ranks_whose_tokens_choose_other_experts_sum_the_gradients_of_one_rank(tmp_path):
    scorer = build_with_listed_experts()
    called = [0] * 16
    [layer] = scorer.model.model.layers
    for index, expert in enumerate(layer.mlp.experts):
        expert.register_forward_hook(lambda *_, i=index: called.__setitem__(i, called[i] + 1))
    for row in random_rows()[:2]:
        scorer(pad_rows([row], pad_token_id=0)).sum().backward()
    # by no row, by one of them and by both
    assert set(called) == {0, 1, 2}
    scorer.sum_gradients()
    run_on_ranks(save_gradients_of_two_ranks, 2, tmp_path / "grads.pt")
    grads = torch.load(tmp_path / "grads.pt")
    for name, parameter in scorer.named_parameters():
        torch.testing.assert_close(grads[name], 2 * parameter.grad, rtol=1e-5, atol=1e-5, msg=name)


class TwoInARow(nn.Module):
    """Modules in a list through which every token passes, as LongCat has them."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlps = nn.ModuleList([mlp, copy.deepcopy(mlp)])

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        return self.mlps[1](self.mlps[0](hidden_BLD))


def test_lists_through_which_every_token_passes_are_sharded_by_any_torch(monkeypatch):
    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params", raising=False)
    model = build_model("llama").eval()
    model.model.layers[0].mlp = TwoInARow(model.model.layers[0].mlp)
    check_lists(model, measure_logit_path(model), None)


class ListedFamily(ListedExperts):
    """The same in place of Llama's own."""

    def __init__(self, config: Any) -> None:
        super().__init__(LLAMA_MLP(config), num_experts=16)


def build_with_a_torch_that_sums_called_parameters(folder: Path) -> None:
    if hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        del FSDPModule.set_reduce_scatter_unused_params
    modeling_llama.LlamaMLP = ListedFamily
    world = init_world()

    def build(kind: str) -> TokenScorer:
        config = Config(
            model=ModelConfig(name_or_path=str(folder), fsdp_policy_mp=None),
            loss=DPOConfig(),
            datasets=["planted"],
            adapter=AdapterConfig(kind=kind, r=2, base="sharded"),
        )
        return build_pair(config.training, PackingConfig(), world, longest=32).policy

    policy = build("lora")
    policy(pad_rows([random_rows()[world.rank]], pad_token_id=0)).sum().backward()
    policy.sum_gradients()
    assert any(parameter.grad.any() for parameter in policy.trained())
    with pytest.raises(
        ConfigError, match=r"only some tokens of .*experts\.\d+.* needs torch 2\.13"
    ):
        build("none")
    dist.destroy_process_group()


def test_listed_experts_that_ranks_cannot_sum_are_refused_before_training(tmp_path):
    build_with_listed_experts().model.save_pretrained(tmp_path)
    run_on_ranks(build_with_a_torch_that_sums_called_parameters, 2, tmp_path)
