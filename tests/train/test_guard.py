"""What is not finite never reaches the weights, on any rank, and its rows are named."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from safetensors.torch import load_file
from stopped_runs import run_in_starts
from tiny_models import read_metrics, save_tiny_model, text_rows, write_rows

import train
from fastpref.checkpoint.agreement import Agreement
from fastpref.cli.command_line import main
from fastpref.config import Config, DPOConfig, ModelConfig
from fastpref.distributed import init_world
from fastpref.errors import NonFiniteError
from fastpref.objectives.step_loss import StepLoss
from fastpref.signals import StopRequest
from fastpref.train import loop, non_finite
from fastpref.train.build import build_run
from fastpref.train.evaluation import evaluate
from fastpref.train.guard import FiniteGuard, GuardState
from fastpref.train.logs.metrics import PendingStep
from fastpref.train.non_finite import Finding
from fastpref.train.optim import build_optimizer
from fastpref.train.resume.start import find_start
from fastpref.train.run import Run
from fastpref.train.run_folder import run_place

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
NAN_ROW = 11
"""Line of train.jsonl whose loss is made NaN."""


def steps_of(guard: FiniteGuard, parameter: torch.Tensor, gradients: list[float]) -> list[bool]:
    """Make steps with these gradients; which of them moved the parameter."""
    moved = []
    for step, gradient in enumerate(gradients, start=1):
        before = parameter.detach().clone()
        parameter.grad = torch.full_like(parameter, gradient)
        guard.apply(step, torch.tensor([0.5, gradient], device=parameter.device))
        moved.append(not torch.equal(parameter, before))
    return moved


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", ["AdamW", "RMSprop"])
def test_from_the_first_step_that_is_not_finite_on_nothing_is_applied(optimizer, device):
    parameter = torch.nn.Parameter(torch.ones(3, device=device))
    built = build_optimizer(optimizer, [parameter], lr=0.1, options={})
    guard = FiniteGuard(built, skip=False, device=torch.device(device))
    assert steps_of(guard, parameter, [1.0, -1.0]) == [True, True]
    assert guard.first_bad_step() == 0
    state = {key: value.clone() for key, value in built.state[parameter].items()}
    assert steps_of(guard, parameter, [1.0, 1.0, NAN, 1.0, INF, 1.0])[2:] == [False] * 4
    assert guard.first_bad_step() == 3
    if optimizer == "AdamW":
        assert float(built.state[parameter]["step"]) == float(state["step"]) + 2
    assert all(torch.isfinite(value).all() for value in built.state[parameter].values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_steps_are_left_out_on_request_until_there_are_ten_in_a_row(optimizer, device):
    parameter = torch.nn.Parameter(torch.ones(3, device=device))
    built = build_optimizer(optimizer, [parameter], lr=0.1, options={})
    guard = FiniteGuard(built, skip=True, device=torch.device(device))
    assert steps_of(guard, parameter, [1.0, NAN, 1.0, INF, NAN]) == [
        True,
        False,
        True,
        False,
        False,
    ]
    assert guard.state() == GuardState(skipped=3, in_a_row=2) and guard.num_skipped == 3
    assert steps_of(guard, parameter, [NAN] * 9) == [False] * 9
    # nine of a start of its own: it counts on from the two before
    other = FiniteGuard(built, skip=True, device=torch.device(device))
    other.load_state(GuardState(skipped=3, in_a_row=2))
    assert steps_of(other, parameter, [NAN] * 8 + [1.0]) == [False] * 9
    assert other.first_bad_step() == 8 - 10 + 1


def test_a_flag_that_the_host_reads_is_awaited_first():
    # a GPU that waits for a lost rank would block the host, which then hears no signal
    parameter = torch.nn.Parameter(torch.ones(3))
    awaited = []
    for optimizer in ("RMSprop", "AdamW"):
        guard = FiniteGuard(
            build_optimizer(optimizer, [parameter], lr=0.1, options={}),
            skip=False,
            device=torch.device("cpu"),
            await_device=lambda name=optimizer: awaited.append(name),
        )
        steps_of(guard, parameter, [1.0, 1.0])
    assert awaited == ["RMSprop", "RMSprop"]
    guard.first_bad_step()
    assert awaited[2:] == ["AdamW"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_guarded_step_has_the_bits_of_an_unguarded_one(device):
    generator = torch.Generator().manual_seed(0)
    start, gradients = (
        torch.randn(257, generator=generator),
        torch.randn(5, 257, generator=generator),
    )
    ends = []
    for guarded in (False, True):
        parameter = torch.nn.Parameter(start.clone().to(device))
        built = build_optimizer("AdamW", [parameter], lr=0.1, options={})
        guard = FiniteGuard(built, skip=False, device=torch.device(device))
        for step, gradient in enumerate(gradients, start=1):
            parameter.grad = gradient.to(device)
            if guarded:
                guard.apply(step, torch.ones(2, device=device))
            else:
                built.step()
        ends.append(parameter.detach())
    assert torch.equal(*ends)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("guard")
    write_rows(base / "words", "train", text_rows(32, seed=1))
    write_rows(base / "words", "test", text_rows(8, seed=2))
    save_tiny_model(base / "model")
    return base


def arguments(base: Path, run_dir: Path, *options: str) -> list[str]:
    return [
        *("model=blank_model", f"model.name_or_path={base / 'model'}", "model.fsdp_policy_mp=null"),
        *("datasets=[words]", f"base_data_dir={base}", f"run_dir={run_dir}", "max_length=64"),
        *("max_prompt_length=32", "batch_size=4", "lr=1e-3", "warmup_steps=0", "loss=dpo"),
        *("n_eval_examples=0", "minimum_log_interval_secs=0", "checkpoint.every=1", *options),
    ]


def run(arguments: list[str]) -> int:
    return main(arguments, train.compose_choices, train.CONFIG_DIR)


def spoil(lines: list[int], *, value: float = NAN) -> Any:
    """Make the losses of some lines of train.jsonl what no loss may be, as a bad row would."""
    real = loop.train_step

    def train_step(run: Any, batches: Any, step: int) -> Any:
        compute = type(run.step_loss).compute
        places = run.train.data.places
        _, plan = run.train.plan(step, run.world.data_size)
        rows = run.train.order.batch(step)
        own = iter([of_ranks[run.world.data_rank].rows for of_ranks in plan] * 2)

        def spoilt(self: Any, batch: Any, step: int | None) -> Any:
            losses, metrics = compute(self, batch, step)
            bad = [places.line[row] in lines for row in rows[next(own)]]
            if any(bad):
                losses = torch.where(torch.tensor(bad), value * losses, losses)
                metrics = metrics | {"loss": losses.detach()}
            return losses, metrics

        run.step_loss.compute = spoilt.__get__(run.step_loss)
        return real(run, batches, step)

    loop.train_step = train_step
    return real


@pytest.fixture
def spoilt_row():
    real = spoil([NAN_ROW])
    yield
    loop.train_step = real


def test_a_row_that_is_not_finite_is_named_and_the_weights_are_those_before(
    base, tmp_path, spoilt_row, capsys
):
    run_dir = tmp_path / "run"
    assert run(arguments(base, run_dir)) == 5
    said = capsys.readouterr().err
    [record] = read_metrics(run_dir, "train")[-1:]
    step = record["step"] + 1
    assert f"the loss of {base}/words/train.jsonl:{NAN_ROW} on rank 0 is not finite" in said
    assert f"at step {step}; " in said and f"those after step {step - 1}" in said
    assert [r["step"] for r in read_metrics(run_dir, "train")] == list(range(1, step))
    # what was saved last is the state before it, and nothing was exported
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step-{step - 1:08d}\n"
    assert not (run_dir / "LATEST").exists()


def test_a_step_that_is_not_finite_is_left_out_on_request(base, tmp_path, spoilt_row):
    run_dir = tmp_path / "run"
    assert run(arguments(base, run_dir, "on_nonfinite=skip")) == 0
    records = read_metrics(run_dir, "train")
    assert len(records) == 8
    [bad] = [r["step"] for r in records if r["loss/train"] is None]
    assert [r["skipped_steps"] for r in records] == [0.0] * (bad - 1) + [1.0] * (9 - bad)
    weights = load_file(run_dir / "LATEST" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_ten_steps_in_a_row_end_a_run_that_leaves_them_out(base, tmp_path, capsys):
    real = spoil(list(range(1, 33)), value=INF)
    try:
        assert run(arguments(base, tmp_path / "run", "on_nonfinite=skip", "n_epochs=3")) == 5
    finally:
        loop.train_step = real
    assert "at step 1, the first of 10 in a row," in capsys.readouterr().err


def test_steps_that_earlier_starts_left_out_are_counted_on(base, tmp_path, spoilt_row):
    options = ("on_nonfinite=skip", "n_epochs=2", "checkpoint.every=0")
    command = arguments(base, tmp_path / "one", *options)
    assert run_in_starts(command, 8) == [75, 75, 0]
    records = read_metrics(tmp_path / "one", "train")
    left_out = [record["loss/train"] is None for record in records]
    assert [record["skipped_steps"] for record in records] == list(accumulate(left_out))
    # one in the first start, and one in the second
    assert left_out[:8].count(True) == left_out[8:].count(True) == 1


def test_ten_steps_in_a_row_end_a_run_of_several_starts(base, tmp_path, capsys):
    real = spoil(list(range(1, 33)))
    try:
        command = arguments(base, tmp_path / "all", "on_nonfinite=skip", "n_epochs=3")
        assert run_in_starts(command, 4) == [75, 75, 5]
    finally:
        loop.train_step = real
    assert "at step 1, the first of 10 in a row," in capsys.readouterr().err


@pytest.mark.parametrize("beta", ["1e38", "1e22"])
def test_a_gradient_that_overflows_is_named_by_the_rows_of_its_micro_batch(
    base, tmp_path, capsys, beta
):
    # the loss is finite; its product with an enormous beta is not, or the square of that
    options = (f"loss.beta={beta}", "packing.max_tokens=1")
    assert run(arguments(base, tmp_path / "run", *options)) == 5
    said = capsys.readouterr().err
    assert "is not finite at step" in said and f"the gradient of {base}/words/train.jsonl:" in said


def test_rows_are_named_in_the_micro_batches_that_memory_has_room_for(
    base, tmp_path, capsys, monkeypatch
):
    compute = StepLoss.compute

    def of_one_pair(self: StepLoss, batch: Any, step: int | None) -> Any:
        if batch.num_sequences > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute(self, batch, step)

    monkeypatch.setattr(StepLoss, "compute", of_one_pair)
    assert run(arguments(base, tmp_path / "run", "loss.beta=1e38")) == 5
    assert f"the gradient of {base}/words/train.jsonl:" in capsys.readouterr().err


def small_config(base: Path, run_dir: Path) -> Config:
    return Config(
        model=ModelConfig(name_or_path=str(base / "model"), fsdp_policy_mp=None),
        loss=DPOConfig(),
        datasets=["words"],
        base_data_dir=str(base),
        run_dir=str(run_dir),
        max_length=64,
        max_prompt_length=32,
        batch_size=4,
    )


@contextmanager
def not_applied(config: Config) -> Iterator[Run]:
    """A run whose second step of three was not finite, which nothing has looked at yet."""
    world = init_world()
    try:
        with Agreement(world) as agreement:
            run = build_run(config, world, find_start("never", run_place(config), agreement))
            for step, loss in enumerate([0.5, NAN, 0.5], start=1):
                run.log.add_step(step_of(step, loss))
                run.updates.guard.apply(step, torch.tensor([loss, 1.0]))
            yield run
    finally:
        dist.destroy_process_group()


def test_an_evaluation_writes_no_line_of_a_step_that_was_not_applied(base, tmp_path):
    """On a GPU an evaluation may be the first to look whether the steps before it were finite."""
    with not_applied(small_config(base, tmp_path / "run")) as run, StopRequest() as stop:
        assert evaluate(run, stop) is None
        assert stop.requested
    assert [record["step"] for record in read_metrics(tmp_path / "run", "train")] == [1]


def test_a_step_found_at_the_end_alone_writes_no_line_and_is_said_to_be_finite_again(
    base, tmp_path
):
    """On a GPU no step waits for the device, so the end may be the first to look."""
    with not_applied(small_config(base, tmp_path / "run")) as run:
        with pytest.raises(NonFiniteError, match=r"computed again is finite .* at step 2;"):
            non_finite.raise_if_not_finite(run)
        run.log.flush()
    assert [record["step"] for record in read_metrics(tmp_path / "run", "train")] == [1]


def test_rows_of_every_rank_are_named_and_losses_before_gradients():
    one, two = Finding([], ["a:1"]), Finding([], ["b:2", "b:3"])
    nothing = Finding([], [])
    said = "the gradient of a:1 on rank 0; b:2, b:3 on rank 2"
    assert non_finite.describe([one, nothing, two]) == said
    said = "the loss of c:4 on rank 1; c:5 on rank 2"
    assert non_finite.describe([one, Finding(["c:4"], []), Finding(["c:5"], ["b:2"])]) == said


def step_of(number: int, loss: float) -> PendingStep:
    counts = dict.fromkeys(("num_examples", "num_tokens", "num_computed", "num_scored"), 1)
    values = torch.tensor([loss])
    return PendingStep(
        step=number, examples=number, lr=1e-3, names=["loss/train"], values=values, **counts
    )


def test_no_rows_are_named_but_those_of_the_micro_batch_whose_gradient_is_not_finite(
    base, tmp_path, monkeypatch
):
    config = small_config(base, tmp_path / "run")
    config.packing.max_tokens = "1"
    add_gradients, calls = non_finite.add_gradients, []

    def add(run: Any, *arguments: Any) -> Any:
        result = add_gradients(run, *arguments)
        calls.append(run)
        if len(calls) == 2:
            run.policy.trained()[0].grad[0] = INF
        return result

    monkeypatch.setattr(non_finite, "add_gradients", add)
    world = init_world()
    try:
        with Agreement(world) as agreement:
            run = build_run(config, world, find_start("never", run_place(config), agreement))
            finding = non_finite.look_at(run, 0)
            micro_batch = run.train.step(0, world).micro_batches[1]
    finally:
        dist.destroy_process_group()
    [row] = run.train.order.batch(0)[micro_batch.rows]
    assert len(calls) == 4
    assert finding == ([], [run.train.data.places.name(int(row))])


def train_on_rank(command: list[str], lines: list[int], out: Path) -> None:
    spoil(lines)
    started = time.monotonic()
    code = run(command)
    out.joinpath(os.environ["RANK"]).write_text(json.dumps([code, time.monotonic() - started]))


def test_what_is_not_finite_on_one_of_two_ranks_ends_both(base, tmp_path, capfd):
    run_on_ranks(train_on_rank, 2, arguments(base, tmp_path / "run"), [NAN_ROW], tmp_path)
    results = [json.loads((tmp_path / rank).read_text()) for rank in "01"]
    assert [code for code, _ in results] == [5, 5]
    assert f"train.jsonl:{NAN_ROW} on rank " in capfd.readouterr().err


def look_with_a_bad_shard(base: Path, out: Path) -> None:
    """Look through a step whose gradient is infinite in one number, which rank 0 holds."""
    config, world = small_config(base, out / "run"), init_world()
    add_gradients = non_finite.add_gradients

    def add(run: Any, *arguments: Any) -> Any:
        result = add_gradients(run, *arguments)
        if world.is_main:
            run.policy.trained()[0].grad.to_local()[0] = INF
        return result

    non_finite.add_gradients = add
    try:
        with Agreement(world) as agreement:
            run = build_run(config, world, find_start("never", run_place(config), agreement))
            finding = non_finite.look_at(run, 0)
    finally:
        dist.destroy_process_group()
    out.joinpath(str(world.rank)).write_text(json.dumps(finding))


def test_every_rank_names_its_rows_where_one_has_the_shard_that_is_not_finite(base, tmp_path):
    run_on_ranks(look_with_a_bad_shard, 2, base, tmp_path)
    for rank in "01":
        losses, gradients = json.loads((tmp_path / rank).read_text())
        assert not losses and len(gradients) == 2
