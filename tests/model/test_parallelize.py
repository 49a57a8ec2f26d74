"""Sharding, recomputation and compilation leave the numbers as they are."""

import pytest
import torch
import torch.distributed as dist
from tiny_models import build_family, build_model, random_rows

from fastpref.batches.padded import pad_rows
from fastpref.distributed import init_world
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
