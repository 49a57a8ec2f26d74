"""Master weights on one rank: the numbers of FSDP2's mixed precision, and nothing left behind."""

import pytest
import torch
import torch.distributed as dist
from tiny_models import build_model, random_rows

from fastpref.batches.padded import pad_rows
from fastpref.distributed import init_world
from fastpref.model.parallelize import parallelize, wrap_blocks
from fastpref.model.scorer import TokenScorer
from fastpref.train.optim import build_optimizer


@pytest.fixture(scope="module")
def mesh():
    yield init_world().mesh
    dist.destroy_process_group()


def train_steps(scorer, optimizer, *, num_steps=3, num_micro_batches=2):
    """Scores of every step; each step's gradient is a sum over micro-batches."""
    batch = pad_rows(random_rows(), pad_token_id=0).to(next(scorer.parameters()).device)
    scorer.follow(optimizer)
    seen = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        for _ in range(num_micro_batches):
            scores_N = scorer(batch)
            (-scores_N.mean()).backward()
            scorer.release()
        seen.append(scores_N.detach())
        optimizer.step()
    return seen


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama tied", "gpt2"])
@pytest.mark.parametrize(
    ("stored", "computed"),
    [("float32", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16")],
)
def test_training_has_the_bits_of_fsdp_on_one_rank(mesh, family, stored, computed, recompute):
    def build():
        model = build_model(family).to(getattr(torch, stored))
        wrap_blocks(model, activation_checkpointing=recompute)
        return TokenScorer(model)

    whole, sharded = build(), build()
    whole.to(mesh.device_type).keep_masters(getattr(torch, computed))
    parallelize(sharded, mesh, compute_dtype=getattr(torch, computed))
    runs = [
        train_steps(scorer, build_optimizer("SGD", scorer.parameters(), lr=0.5, options={}))
        for scorer in (whole, sharded)
    ]
    for ours, theirs in zip(*runs, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(runs[0][0], runs[0][1])
    pairs = zip(whole.named_parameters(), sharded.named_parameters(), strict=True)
    for (name, ours), (_, theirs) in pairs:
        assert ours.dtype == getattr(torch, stored)
        assert torch.equal(ours, theirs.full_tensor()), name
        assert torch.equal(ours.grad, theirs.grad.full_tensor()), name


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop", "Adafactor", "Rprop", "NAdam"])
def test_the_copy_follows_every_optimizer(name):
    scorer = TokenScorer(build_model("llama tied"))
    scorer.keep_masters(torch.bfloat16)
    masters = list(scorer.parameters())
    optimizer = build_optimizer(name, masters, lr=1e-2, options={})
    seen = train_steps(scorer, optimizer)
    assert all(a is b for a, b in zip(scorer.parameters(), masters, strict=True))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    scorer(pad_rows(random_rows(), pad_token_id=0))
    copies = list(scorer.parameters())
    assert {copy.dtype for copy in copies} == {torch.bfloat16}
    assert all(
        torch.equal(copy, master.bfloat16()) for copy, master in zip(copies, masters, strict=True)
    )
    assert scorer.head.weight is scorer.model.get_input_embeddings().weight


def test_weights_that_are_loaded_reach_the_copy():
    scorer, other = (TokenScorer(build_model("llama")) for _ in range(2))
    with torch.no_grad():
        other.head.weight.mul_(2)
    batch = pad_rows(random_rows(), pad_token_id=0)
    for each in (scorer, other):
        each.keep_masters(torch.bfloat16)
        each(batch)
        each.release()
    assert not torch.equal(scorer(batch), other(batch))
    scorer.release()
    other.release()
    scorer.load_state_dict(other.state_dict())
    assert torch.equal(scorer(batch), other(batch))
