"""Every supported family scores tokens as its own logits say, values and gradients."""

import pytest
import torch
from tiny_models import FAMILIES, build_model, random_rows
from torch.nn import functional as F

from fastpref.batches.padded import pad_rows
from fastpref.model.scorer import TokenScorer


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_match_the_models_own_logits(family):
    model = build_model(family)
    rows = random_rows()
    batch = pad_rows(rows, pad_token_id=0)
    upstream_N = torch.randn(len(batch.target), generator=torch.Generator().manual_seed(2))

    scores_N = TokenScorer(model)(batch)
    (scores_N * upstream_N).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    # each sequence alone, unpadded, through the model's own forward
    expected = []
    sequences = [(r.prompt_ids, r.chosen_ids) for r in rows]
    sequences += [(r.prompt_ids, r.rejected_ids) for r in rows]
    for prompt, response in sequences:
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
        logps = F.log_softmax(logits.float(), -1)[len(prompt) - 1 : -1]
        expected.append(logps.gather(1, torch.tensor(response)[:, None])[:, 0])
    expected_N = torch.cat(expected)
    (expected_N * upstream_N).sum().backward()

    torch.testing.assert_close(scores_N, expected_N, rtol=2e-5, atol=2e-5)
    largest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            # a key's bias moves all scores of a query alike: its gradient is zero and rounding
            scale = max(parameter.grad.abs().max().item(), 1e-3 * largest)
            error = (ours[name] - parameter.grad).abs().max().item()
            # a key bias cancels in the softmax: its gradient is rounding alone
            assert error <= 1e-4 * scale + 1e-7, f"{name}: {error:.2e} of {scale:.2e}"


@pytest.mark.parametrize("direction", ["reference_policy", "policy_reference"])
@pytest.mark.parametrize("family", ["llama tied", "gemma2", "gpt-j"])
def test_equal_models_give_log_ratios_and_kl_of_exactly_zero(family, direction):
    policy, reference = TokenScorer(build_model(family)), TokenScorer(build_model(family))
    batch = pad_rows(random_rows(), pad_token_id=0)
    with torch.no_grad():
        states = reference.states(batch)
    scores = policy(batch, states, direction)
    assert torch.equal(scores.logps, scores.reference_logps)
    assert not scores.kl.any()
    scores.kl.sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in policy.parameters())


def test_kl_matches_the_two_models_own_distributions():
    policy = TokenScorer(build_model("gemma2"))
    reference = TokenScorer(build_model("gemma2", final_logit_softcapping=3.0))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = pad_rows(random_rows(1), pad_token_id=0)
    log_p, log_q = (
        F.log_softmax(
            scorer.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits, -1
        ).flatten(0, 1)[batch.score_index]
        for scorer in (policy, reference)
    )
    with torch.no_grad():
        states = reference.states(batch)
        forward = policy(batch, states, "reference_policy").kl
        reverse = policy(batch, states, "policy_reference").kl
    torch.testing.assert_close(
        forward, (log_q.exp() * (log_q - log_p)).sum(-1), atol=2e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        reverse, (log_p.exp() * (log_p - log_q)).sum(-1), atol=2e-5, rtol=1e-4
    )


def test_an_empty_batch_keeps_the_graph_and_gives_zero_gradients():
    scorer = TokenScorer(build_model("llama tied"))
    scores_N = scorer(pad_rows([], pad_token_id=0))
    assert scores_N.shape == (0,)
    scores_N.sum().backward()
    grads = [p.grad for p in scorer.parameters()]
    assert all(grad is not None and grad.isfinite().all() and not grad.any() for grad in grads)
