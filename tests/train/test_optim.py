"""Optimizers by name, the schedules' shapes, and the steps that they make."""

import copy
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import ALONE, run_on_ranks
from tiny_models import build_model, random_rows
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref.batch import EncodedRow
from fastpref.batches.layouts import PaddedRows
from fastpref.batches.loader import Loader
from fastpref.batches.order import GlobalOrder
from fastpref.config import DPOConfig, OptimConfig
from fastpref.distributed import World, init_world
from fastpref.errors import ConfigError
from fastpref.memory.repetition import Repetition
from fastpref.model.scorer import TokenScorer
from fastpref.objectives.objective import build_objective
from fastpref.objectives.step_loss import StepLoss
from fastpref.train.optim import build_optimizer, build_scheduler, check_optimizer
from fastpref.train.step import clip_gradients, train_step
from fastpref.train.updates import build_updates


def learning_rates(schedule: str, *, warmup_steps: int, num_steps: int, **options) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(
        optimizer,
        schedule=schedule,
        warmup_steps=warmup_steps,
        num_steps=num_steps,
        min_lr_ratio=options.get("min_lr_ratio", 0.0),
    )
    rates = []
    # the last one is logged after the last step
    for _ in range(num_steps + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_warm_up_is_the_seeds_and_then_constant():
    rates = learning_rates("constant", warmup_steps=150, num_steps=200)
    assert rates[0] == pytest.approx(1 / 151)
    assert rates[149] == pytest.approx(150 / 151)
    assert rates[150:] == [1.0] * 51


@pytest.mark.parametrize(("schedule", "after_a_quarter"), [("linear", 0.775), ("cosine", 0.8682)])
def test_decay_starts_at_the_peak_and_heads_for_the_floor(schedule, after_a_quarter):
    rates = learning_rates(schedule, warmup_steps=10, num_steps=111, min_lr_ratio=0.1)
    # the floor is one of the decay, not of the warm-up
    assert rates[:10] == pytest.approx([step / 11 for step in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[35] == pytest.approx(after_a_quarter, abs=1e-5)
    assert rates[60] == pytest.approx(0.55)
    assert rates[110:] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize(
    "name", ["AdamW", "RMSprop", "SGD", "Adagrad", "NAdam", "Adafactor", "Rprop"]
)
def test_any_torch_optimizer_takes_a_step(name):
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = build_optimizer(name, [parameter], lr=0.1, options={"weight_decay": None})
    parameter.square().sum().backward()
    optimizer.step()
    assert (parameter < 1).all()


def test_updates_take_schedule_floor_warm_up_and_options_from_their_arguments():
    updates = build_updates(
        TokenScorer(build_model("llama")),
        ALONE,
        optimizer="SGD",
        lr=2.0,
        options=OptimConfig(schedule="linear", min_lr_ratio=0.1, momentum=0.5),
        warmup_steps=1,
        num_steps=11,
        max_grad_norm=1.0,
        skip_nonfinite=False,
    )
    rates = []
    for _ in range(11):
        rates.append(updates.lr)
        updates.optimizer.step()
        updates.scheduler.step()
    # half of the peak, then in equal steps from the peak to the floor
    assert rates == pytest.approx([1.0, *(2.0 - 0.2 * step for step in range(10))])
    assert updates.optimizer.param_groups[0]["momentum"] == 0.5


def test_options_reach_the_optimizer_and_null_is_torchs_default():
    parameter = torch.nn.Parameter(torch.ones(1))
    options = {"weight_decay": 0.5, "eps": None}
    group = build_optimizer("AdamW", [parameter], lr=0.1, options=options).param_groups[0]
    assert group["weight_decay"] == 0.5 and group["fused"]
    assert group["eps"] == torch.optim.AdamW([parameter]).param_groups[0]["eps"]


@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "Adafactor"])
def test_what_is_added_to_the_denominator_reaches_optimizers(name):
    steps = []
    for eps in (1e-8, 1e3):
        parameter = torch.nn.Parameter(torch.ones(3, 4))
        optimizer = build_optimizer(name, [parameter], lr=0.1, options={"eps": eps})
        parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
        steps.append((1 - parameter).mean().item())
    assert 0 <= steps[1] < 0.1 * steps[0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("AdamX", {}, r"nearest: Adam"),
        ("adamw", {}, r"nearest: AdamW"),
        ("LBFGS", {}, r"cannot train a language model"),
        ("Muon", {}, r"cannot train a language model"),
        ("SparseAdam", {}, r"cannot train a language model"),
        ("AdamW", {"momentum": 0.9}, r"optim\.momentum: torch\.optim\.AdamW takes no momentum"),
    ],
)
def test_what_torch_cannot_do_is_refused_by_name(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(name, [torch.nn.Parameter(torch.ones(1))], lr=0.1, options=options)


def build_sharded(world: World) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 5, bias=False))
    fully_shard(model, mesh=world.mesh)
    return model


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        optimizer.zero_grad()
        model(torch.randn(7, 5, generator=generator)).square().sum().backward()
        optimizer.step()


def go_on_from_saved_state(names: list[str]) -> None:
    """On each rank: a sharded optimizer is saved, loaded and goes on as torch's own on one."""
    world = init_world()
    options = StateDictOptions(full_state_dict=True)
    for name in names:
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 5, bias=False))
        own = getattr(torch.optim, name)(whole.parameters(), lr=0.05)
        take_steps(whole, own, range(8))

        first, second = build_sharded(world), build_sharded(world)
        optimizers = [
            build_optimizer(name, model.parameters(), lr=0.05, options={})
            for model in (first, second)
        ]
        # each rank sees all gradients, which are summed
        for model in (first, second):
            model.set_gradient_divide_factor(float(world.size))
            model.set_force_sum_reduction_for_comms(True)
        take_steps(first, optimizers[0], range(4))
        held = [p for group in optimizers[0].param_groups for p in group["params"]]
        assert all(a is b for a, b in zip(held, first.parameters(), strict=True))
        weights, state = get_state_dict(first, optimizers[0], options=options)
        set_state_dict(
            second,
            optimizers[1],
            model_state_dict=weights,
            optim_state_dict=state,
            options=options,
        )
        take_steps(second, optimizers[1], range(4, 8))
        for ours, theirs in zip(second.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-6, atol=1e-7)
    dist.destroy_process_group()


def test_optimizers_of_local_shards_have_the_models_parameters_and_a_state_to_save():
    go_on_from_saved_state(["Adafactor", "AdamW", "Rprop"])
    run_on_ranks(go_on_from_saved_state, 2, ["AdamW", "Rprop"])


class _Sharded(TorchDispatchMode):
    """Collects the operations on sharded tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += [func] if DTensor in types else []
        return func(*args, **kwargs or {})


def test_clipping_and_fused_steps_see_local_shards():
    # for lists of sharded tensors torch takes time that grows with the square of their length
    world = init_world()
    model = build_sharded(world)
    optimizer = build_optimizer("AdamW", model.parameters(), lr=0.05, options={})
    policy = SimpleNamespace(trained=lambda: list(model.parameters()))
    run: Any = SimpleNamespace(
        policy=policy, world=world, updates=SimpleNamespace(max_grad_norm=0.5)
    )
    states = []
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(7, 5)).square().sum().backward()
        expected = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()]).norm()
        with _Sharded() as sharded:
            torch.testing.assert_close(clip_gradients(run), expected)
            optimizer.step()
        clipped = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()]).norm()
        assert expected > 0.5 and clipped == pytest.approx(0.5)
        assert sharded.seen == []
        states.append([id(x) for state in optimizer.state.values() for x in state.values()])
    # the tensors of its state stay the same ones: step and two means of each parameter
    assert states[0] == states[1] and len(states[0]) == 9
    dist.destroy_process_group()


def test_an_optimizer_of_whole_matrices_is_refused_on_several_ranks():
    assert check_optimizer("Adafactor", {}, world_size=1) is torch.optim.Adafactor
    with pytest.raises(ConfigError, match="whole matrices"):
        check_optimizer("Adafactor", {}, world_size=2)


def plain_dpo_loss(model: Any, reference: Any, row: EncodedRow, beta: float) -> Tensor:
    """Of a pair, from the models' own logits."""
    margins = []
    for ids in (row.chosen_ids, row.rejected_ids):
        tokens, start = torch.tensor([[*row.prompt_ids, *ids]]), len(row.prompt_ids)
        policy_logps, reference_logps = (
            model(input_ids=tokens).logits[0, start - 1 : -1].log_softmax(-1)
            for model in (model, reference)
        )
        ratios = (policy_logps - reference_logps.detach()).gather(1, tokens[0, start:, None])
        margins.append(ratios.sum())
    return -nn.functional.logsigmoid(beta * (margins[0] - margins[1]))


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=["32 bits", "16 bits"]
)
def test_steps_are_those_of_torch_on_the_models_own_logits(dtype, error):
    rows, model = random_rows(3) + random_rows(2), build_model("llama").eval()
    plain, reference, twin = (copy.deepcopy(model) for _ in range(3))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    table = {name: [getattr(row, name) for row in rows] for name in names}
    loader = Loader(
        data=SimpleNamespace(dataset=datasets.Dataset.from_dict(table)),
        order=GlobalOrder(np.arange(5), batch_size=3, seed=0, n_epochs=2, drop_last=False),
        layout=PaddedRows(),
        pad_token_id=0,
        min_micro_batches=2,
    )
    policy, frozen = TokenScorer(model), TokenScorer(twin)
    for scorer in (policy, frozen):
        scorer.keep_masters(dtype)
    updates = build_updates(
        policy,
        ALONE,
        optimizer="AdamW",
        lr=0.01,
        options=OptimConfig(schedule="linear"),
        warmup_steps=2,
        num_steps=4,
        max_grad_norm=0.5,
        skip_nonfinite=False,
    )
    run: Any = SimpleNamespace(
        updates=updates,
        policy=policy,
        train=loader,
        world=ALONE,
        config=SimpleNamespace(on_nonfinite="stop"),
        repetition=Repetition(num_ranks=1),
        step_loss=StepLoss(build_objective(DPOConfig(beta=0.3)), policy, frozen),
    )
    world: Any = SimpleNamespace(data_rank=0, data_size=1, device=ALONE.device)
    optimizer = torch.optim.AdamW(plain.parameters())
    for index, share in enumerate((1 / 3, 2 / 3, 1.0, 0.0)):
        batches = loader.step(index, world)
        names, values, num_computed = train_step(run, batches, index)
        losses = [
            plain_dpo_loss(plain, reference, rows[row], 0.3) for row in loader.order.batch(index)
        ]
        optimizer.zero_grad()
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = share * 0.01
        optimizer.step()
        found = dict(zip(names, values.tolist(), strict=True))
        assert norm > 0.5 and len(batches.batches) == 2
        assert found["loss/train"] == pytest.approx(loss.item(), rel=error)
        assert found["grad_norm"] == pytest.approx(norm.item(), rel=error)
        assert num_computed == batches.num_computed
    for ours, theirs in zip(policy.parameters(), plain.parameters(), strict=True):
        assert (ours - theirs).norm() <= error * theirs.norm()
