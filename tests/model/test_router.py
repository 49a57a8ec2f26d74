"""The loss of a router's balance: transformers' own of one pair, the same in every layout."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_model, random_rows
from torch import Tensor, nn

from fastpref.batch import Batch, EncodedRow
from fastpref.batches.filled import fill_up
from fastpref.batches.packed import pack_rows
from fastpref.batches.padded import pad_rows
from fastpref.config import DPOConfig, SFTConfig
from fastpref.errors import ConfigError
from fastpref.model.attention.interface import build_attention
from fastpref.model.logit_path import measure_logit_path
from fastpref.model.parallelize import wrap_blocks
from fastpref.model.router import Router, RouterBalance, choose_balance, find_router
from fastpref.model.scorer import TokenScorer
from fastpref.objectives.objective import build_objective
from fastpref.objectives.step_loss import StepLoss

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from tiny_families import build_tiny

FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "phimoe"]
COEFFICIENT = 0.3


def build(family: str, **overrides: Any) -> Any:
    """A model whose router logits are far enough apart that rounding moves no token."""
    torch.manual_seed(0)
    model = build_tiny(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    for name, value in overrides.items():
        for module in model.modules():
            if hasattr(module, name):
                setattr(module, name, value)
    return model


def build_scorer(model: Any, *, packed: bool = False, coefficient: float = 1.0) -> TokenScorer:
    router = find_router(model.eval(), "model")
    assert router is not None and not router.obstacle
    attention = build_attention("sdpa") if packed else None
    balance = RouterBalance(coefficient, router.top_k) if coefficient else None
    return TokenScorer(model, attention, measure_logit_path(model), balance=balance)


def rows() -> list[EncodedRow]:
    """Pairs with prompts, and beginnings of responses, in common."""
    encoded = random_rows(3)
    first, second, third = encoded
    twin = second._replace(chosen_ids=third.chosen_ids)
    alike = first._replace(rejected_ids=[*first.chosen_ids[:2], 9, 9, 8])
    return [*encoded, twin, alike]


LAYOUTS = {
    "padded": lambda rows: pad_rows(rows, pad_token_id=0),
    "packed": lambda rows: pack_rows(rows, pad_token_id=0, share_prompt=False),
    "shared": lambda rows: pack_rows(rows, pad_token_id=0),
    "filled up": lambda rows: fill_up(pack_rows(rows, pad_token_id=0), 300, pad_token_id=0),
}


def losses_of(scorer: TokenScorer, batch: Batch, num_rows: int) -> Tensor:
    scorer.zero_grad()
    scorer(batch)
    assert scorer.balance is not None
    return scorer.balance.take(batch, num_rows).losses


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def loss_of_transformers(model: Any, row: EncodedRow) -> Tensor:
    """Of the prompt and both responses of a pair, each token once, without the last ones."""
    prompt = list(row.prompt_ids)
    sequences = [prompt + list(r[:-1]) for r in (row.chosen_ids, row.rejected_ids) if len(r)]
    of_layers = []
    for i, sequence in enumerate(sequences):
        output = model.model(input_ids=torch.tensor([sequence]), output_router_logits=True)
        # a prompt counts once
        start = len(prompt) if i else 0
        of_layers.append([logits[start:] for logits in output.router_logits])
    together = tuple(torch.cat(parts) for parts in zip(*of_layers, strict=True))
    family: Any = sys.modules[type(model).__module__]
    return family.load_balancing_loss_func(
        together, together[0].shape[-1], model.num_experts_per_tok
    )


@pytest.mark.parametrize("sft", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_pair_is_the_one_of_transformers_over_its_tokens(family, sft):
    model = build(family)
    pairs = [row._replace(rejected_ids=[]) if sft else row for row in rows()]
    losses = losses_of(build_scorer(model), pad_rows(pairs, pad_token_id=0), len(pairs))
    losses.sum().backward()
    ours = gradients(model)
    model.zero_grad()
    expected = torch.stack([loss_of_transformers(model, row) for row in pairs])
    expected.sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    theirs = gradients(model)
    assert ours.keys() == theirs.keys() and any("gate" in n or "router" in n for n in ours)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_shared_and_padded_rows_have_the_same_loss(family):
    model, found = build(family), {}
    for name, layout in LAYOUTS.items():
        losses = losses_of(build_scorer(model, packed=name != "padded"), layout(rows()), 5)
        losses.backward(torch.linspace(1, 2, 5))
        found[name] = losses.detach(), gradients(model)
    for losses, grads in found.values():
        torch.testing.assert_close(losses, found["padded"][0], rtol=1e-5, atol=1e-5)
        for name, gradient in found["padded"][1].items():
            torch.testing.assert_close(grads[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_has_the_same_loss_whatever_it_is_computed_with(layout):
    # by itself a row has no padding, and nobody to share a prompt with
    scorer = build_scorer(build("mixtral"), packed=layout != "padded")
    together = losses_of(scorer, LAYOUTS[layout](rows()), 5).detach()
    alone = [losses_of(scorer, LAYOUTS[layout]([row]), 1).item() for row in rows()]
    assert together.tolist() == pytest.approx(alone, rel=1e-6)
    # they are not all one number
    assert together.std() > 0.01


def test_a_rank_without_rows_has_a_loss_of_no_row_and_gradients_of_zero():
    for packed, batch in ((False, pad_rows([], pad_token_id=0)), (True, LAYOUTS["shared"]([]))):
        scorer = build_scorer(build("mixtral"), packed=packed)
        losses = losses_of(scorer, batch, 0)
        assert losses.shape == (0,)
        losses.sum().backward()
        assert not any(gradient.any() for gradient in gradients(scorer).values())


def test_recomputed_blocks_count_once_and_give_the_same_bits():
    results = []
    for recompute in (False, True):
        model = build("mixtral")
        scorer = build_scorer(model)
        wrap_blocks(model, activation_checkpointing=recompute)
        losses = losses_of(scorer, LAYOUTS["padded"](rows()), 5)
        losses.sum().backward()
        assert scorer.balance is not None and not scorer.balance._logits
        results.append((losses.detach(), gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(results[1][1][name], gradient), name


def step(
    policy: TokenScorer, reference: TokenScorer | None, loss: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    step_loss = StepLoss(build_objective(loss or DPOConfig()), policy, reference)
    losses, metrics = step_loss.compute(LAYOUTS["padded"](rows()), 0)
    return losses, metrics


def test_it_is_added_to_the_policys_loss_and_told_beside_it():
    plain, policy, reference = (
        build_scorer(build("mixtral"), coefficient=c) for c in (0, COEFFICIENT, 0)
    )
    losses, metrics = step(policy, reference)
    preferences, expected = step(plain, reference)
    torch.testing.assert_close(losses, preferences + COEFFICIENT * metrics["router_aux_loss"])
    added = {"router_aux_loss", "router_max_load"}
    assert metrics.keys() == expected.keys() | added
    assert all(torch.equal(metrics[name], value) for name, value in expected.items())
    assert torch.equal(metrics["loss"], torch.full((5,), 2.0).log())
    assert all(metrics[name].shape == (5,) and not metrics[name].requires_grad for name in added)
    # of 4 experts of which a token has 2
    assert ((metrics["router_max_load"] > 1) & (metrics["router_max_load"] <= 2)).all()
    losses.sum().backward()
    assert not gradients(reference)


def test_held_out_rows_have_no_loss_of_the_router():
    policy = build_scorer(build("mixtral"), coefficient=COEFFICIENT)
    with torch.no_grad():
        losses, metrics = step(policy, None, SFTConfig())
    assert torch.equal(losses, metrics["loss"]) and "router_aux_loss" not in metrics


def test_what_a_failed_step_has_left_is_freed():
    policy = build_scorer(build("mixtral"))
    policy(LAYOUTS["padded"](rows()))
    assert policy.balance is not None and policy.balance._logits
    policy.release()
    assert not policy.balance._logits


@pytest.mark.parametrize(
    ("family", "noise"),
    [
        ("mixtral", {"jitter_noise": 0.5}),
        ("phimoe", {"input_jitter_noise": 0.5}),
        ("dbrx", {"moe_jitter_eps": 0.5}),
    ],
)
def test_the_experts_jitter_is_off_while_a_policy_trains(family, noise):
    batch, found = LAYOUTS["padded"](rows()), []
    for changes in ({}, noise):
        model = build(family, **changes)
        assert not changes or any(hasattr(module, *changes) for module in model.modules())
        scorer = TokenScorer(model).train()
        found += [scorer(batch), scorer(batch)]
    assert all(torch.equal(found[0], scores) for scores in found)
    # and would be seen
    noisy = model.train()(input_ids=batch.input_ids).logits
    assert not torch.equal(noisy, model(input_ids=batch.input_ids).logits)


@pytest.mark.parametrize(
    ("family", "coefficient"),
    [("qwen3_moe", 0.001), ("olmoe", 0.01), ("jetmoe", 0.01), ("dbrx", 0.01), ("phimoe", 0.001)],
)
def test_the_checkpoints_coefficient_is_found_under_the_familys_name(family, coefficient):
    model = build(family).eval()
    router = find_router(model, measure_logit_path(model).body)
    if router is None and family == "dbrx":
        pytest.skip("this transformers does not say where its router logits are")
    assert router == Router(top_k=2, coefficient=coefficient)


def test_families_without_such_a_loss_have_one_if_it_is_asked_for(caplog):
    model = build("deepseek_v3").eval()
    router = find_router(model, "model")
    if router is None:
        pytest.skip("this transformers does not say where its router logits are")
    with caplog.at_level(logging.INFO):
        assert choose_balance(None, router, model) is None
    assert "transformers computes none for this family" in caplog.text
    balance = choose_balance(0.01, router, model)
    assert balance is not None and balance.coefficient == 0.01
    assert choose_balance(0, router, model) is None


def test_a_loss_that_cannot_be_had_is_refused_by_its_option():
    model = build_model("llama").eval()
    assert find_router(model, "model") is None
    assert choose_balance(None, None, model) is None and choose_balance(0, None, model) is None
    with pytest.raises(ConfigError, match=r"model\.router_aux_loss=0\.1: Llama.*has no router"):
        choose_balance(0.1, None, model)


def test_a_family_with_another_loss_is_trained_without(monkeypatch):
    model = build("mixtral").eval()
    family: Any = sys.modules[type(model).__module__]
    theirs = family.load_balancing_loss_func
    monkeypatch.setattr(family, "load_balancing_loss_func", lambda *args: 1.5 * theirs(*args))
    router = find_router(model, "model")
    assert router is not None and "another one" in router.obstacle
    assert choose_balance(None, router, model) is None
    with pytest.raises(ConfigError, match="another one"):
        choose_balance(0.1, router, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_asks_for_the_loss_in_every_forward_draws_the_same_samples(family):
    scorer = build_scorer(build(family), coefficient=0)
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    options = {"attention_mask": (ids > 0).long(), "do_sample": False, "max_new_tokens": 3}
    expected = scorer.generate(ids, **options)
    scorer.model.config.get_text_config().output_router_logits = True
    assert torch.equal(scorer.generate(ids, **options), expected)
    assert scorer.model.config.get_text_config().output_router_logits
