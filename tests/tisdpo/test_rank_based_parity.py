"""Training on rank-based weights is the TIS-DPO repository's, in loss and gradient."""

import pytest
import torch
from tiny_models import save_tiny_model, text_rows, write_rows
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref.batch import EncodedRow
from fastpref.batches.padded import pad_rows
from fastpref.config import Config, ModelConfig, TISDPOConfig, TransformConfig
from fastpref.data.encode import load_split
from fastpref.data.options import data_options
from fastpref.model.scorer import TokenScorer
from fastpref.objectives.objective import build_objective
from fastpref.objectives.step_loss import StepLoss

BETA = 0.1


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Two models, a file of weights with ties, and its rows."""
    folder = tmp_path_factory.mktemp("parity")
    models = [str(save_tiny_model(folder / name, seed=i)) for i, name in enumerate("ab")]
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    generator = torch.Generator().manual_seed(3)
    rows = text_rows(6)
    for row in rows:
        for side in ("chosen", "rejected"):
            num_tokens = len(tokenizer(row[side], add_special_tokens=False)["input_ids"])
            # one decimal: several tokens share a value
            weights = (torch.randn(num_tokens, generator=generator) * 10).round() / 10
            row[f"{side}_weight"] = weights.tolist()
    write_rows(folder / "data" / "set", "train", rows)
    return folder, models, tokenizer, rows


def seed_rank_weights(weights: list[float]) -> list[float]:
    """Ascending stable rank i of n -> 0.7 + i / (n - 1) · 0.6."""
    ranked = sorted(range(len(weights)), key=lambda i: (weights[i], i))
    return [0.7 + ranked.index(i) / (len(weights) - 1) * 0.6 for i in range(len(weights))]


def seed_loss(policy, reference, tokenizer, rows, token_level: bool) -> Tensor:
    """Mean of -log σ(β z) over the pairs, from whole logits in float64.

    M = Σ w (log π - log π_ref) and K = Σ w KL(π ‖ π_ref) over a response with EOS, whose weight is
    0; z = M_w - M_l, less α (K_w - K_l) with α = 0.5 where `token_level`.
    """
    losses = []
    for row in rows:
        sums = []
        for side, sign in (("chosen", -1), ("rejected", 1)):
            prompt, response = (
                tokenizer(row[field], add_special_tokens=False)["input_ids"]
                for field in ("prompt", side)
            )
            response = [*response, tokenizer.eos_token_id]
            signed = [sign * weight for weight in row[f"{side}_weight"]]
            w_T = torch.tensor([*seed_rank_weights(signed), 0.0], dtype=torch.float64)
            ids = torch.tensor([prompt + response])
            logps_TV, ref_logps_TV = (
                F.log_softmax(model(input_ids=ids).logits[0, len(prompt) - 1 : -1], -1)
                for model in (policy, reference)
            )
            target_T1 = torch.tensor(response)[:, None]
            ratio_T = (logps_TV - ref_logps_TV).gather(1, target_T1)[:, 0]
            kl_T = (logps_TV.exp() * (logps_TV - ref_logps_TV)).sum(-1)
            sums.append(((w_T * ratio_T).sum(), (w_T * kl_T).sum()))
        (M_w, K_w), (M_l, K_l) = sums
        z = M_w - M_l - (0.5 * (K_w - K_l) if token_level else 0)
        losses.append(-F.logsigmoid(BETA * z))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("token_level", [False, True])
def test_rank_based_training_has_the_seed_loss_and_gradient(case, token_level):
    folder, models, tokenizer, rows = case
    config = Config(
        model=ModelConfig(name_or_path=models[0]),
        loss=TISDPOConfig(beta=BETA, token_level=token_level),
        transform=TransformConfig(method="rank_based"),
        datasets=["set"],
        base_data_dir=str(folder / "data"),
    )
    split = load_split(
        data_options(config), "train", tokenizer, vocab_size=len(tokenizer), quiet=True
    )
    batch = pad_rows(
        [EncodedRow(*row.values()) for row in split.dataset], pad_token_id=tokenizer.pad_token_id
    )
    policy, reference = (
        TokenScorer(AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32))
        for name in models
    )
    reference.requires_grad_(False)
    objective = build_objective(config.loss)
    losses, _ = StepLoss(objective, policy, reference).compute(batch, None)
    loss = losses.sum() / len(rows)
    loss.backward()

    truth, frozen = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64) for name in models
    )
    frozen.requires_grad_(False)
    expected = seed_loss(truth, frozen, tokenizer, rows, token_level)
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-5
    wanted = dict(truth.named_parameters())
    for name, parameter in policy.model.named_parameters():
        scale = wanted[name].grad.abs().max().item()
        difference = (parameter.grad.double() - wanted[name].grad).abs().max().item()
        assert difference <= 1e-4 * scale + 1e-7, name


def test_the_weights_of_this_case_have_ties(case):
    rows = case[3]
    assert any(len(set(row["chosen_weight"])) < len(row["chosen_weight"]) for row in rows)
