"""Memory that runs out inside a step, a held-out pass, sampling or an estimation costs nothing."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from exhaustion import Exhaustion
from ranks import run_on_ranks
from safetensors.torch import load_file
from stopped_runs import run
from tiny_models import read_metrics, save_dataset, save_tiny_model

from fastpref.errors import (
    DistributedError,
    MemoryExhaustedError,
    RankMemoryError,
    is_out_of_memory,
)
from fastpref.memory.repetition import Repetition
from fastpref.train import evaluation, step

LOSSES = {"dpo": ["loss=dpo"], "tdpo2": ["loss=tdpo"], "sft": ["loss=sft"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("memory")
    save_dataset(base, "words")
    save_tiny_model(base / "model")
    return base


def arguments(base: Path, run_dir: Path, *options: str) -> list[str]:
    return [
        *("model=blank_model", f"model.name_or_path={base / 'model'}", "model.fsdp_policy_mp=null"),
        *("datasets=[words]", f"base_data_dir={base}", f"run_dir={run_dir}", "max_length=128"),
        *("max_prompt_length=64", "batch_size=8", "n_epochs=1", "eval_every=16", "lr=1e-3"),
        *("n_eval_examples=8", "eval_batch_size=8", "n_eval_model_samples=4", "warmup_steps=0"),
        *("minimum_log_interval_secs=0", "checkpoint.every=0", *options),
    ]


@pytest.fixture(scope="module")
def whole_run(base, tmp_path_factory) -> Callable[..., Path]:
    """A run of these options whose memory holds everything, once."""

    @functools.cache
    def whole(*options: str) -> Path:
        run_dir = tmp_path_factory.mktemp("whole") / "run"
        assert run(arguments(base, run_dir, *options)) == 0
        return run_dir

    return whole


@contextmanager
def failing(module: Any, name: str, call: int, *shares: float) -> Iterator[list[Exhaustion]]:
    """From one call of a function on, memory runs out after these shares of a call's operations."""
    real, calls, modes = getattr(module, name), 0, list[Exhaustion]()
    counts = list[int]()

    def wrapper(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call - 1:
            # of a call like the one that fails
            with Exhaustion() as counting:
                result = real(*args, **options)
            counts.append(counting.count)
            return result
        if calls < call:
            return real(*args, **options)
        if not modes:
            modes.append(Exhaustion(*(int(share * counts[0]) for share in shares)))
        with modes[0]:
            return real(*args, **options)

    setattr(module, name, wrapper)
    try:
        yield modes
    finally:
        setattr(module, name, real)


def assert_same_run(ours: Path, expected: Path) -> None:
    for split in ("train", "eval"):
        for a, b in zip(read_metrics(ours, split), read_metrics(expected, split), strict=True):
            for key in (key for key in b if key.startswith(("loss", "rewards", "kl", "grad"))):
                assert a[key] == pytest.approx(b[key], rel=1e-6, abs=1e-6), key
    theirs = load_file(expected / "LATEST" / "model.safetensors")
    for name, weight in load_file(ours / "LATEST" / "model.safetensors").items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-6, msg=name)


SHARES = {"reference": 0.05, "policy": 0.3, "backward": 0.6, "its end": 0.95}
CASES = [
    *(("dpo", True, place) for place in SHARES),
    *(("tdpo2", True, "backward"), ("dpo", False, "backward"), ("sft", True, "backward")),
]


@pytest.mark.parametrize(("loss", "packed", "place"), CASES)
def test_a_step_that_memory_did_not_hold_is_computed_again_to_the_same_update(
    base, whole_run, tmp_path, capsys, loss, packed, place
):
    options = [*LOSSES[loss], f"packing.enabled={packed}", "optimizer=SGD", "lr=0.1"]
    options += ["sample_during_eval=false"]
    share, whole = SHARES[place], whole_run(*options)
    capsys.readouterr()
    with failing(step, "accumulate_gradients", 2, share) as modes:
        assert run(arguments(base, tmp_path / "cut", *options)) == 0
    assert [len(mode.failed) for mode in modes] == [1]
    assert "computing them again, from here on at most" in capsys.readouterr().err
    assert_same_run(tmp_path / "cut", whole)
    computed, at_once = (
        [record["tokens_computed"] for record in read_metrics(run_dir, "train")]
        for run_dir in (tmp_path / "cut", whole)
    )
    # the step before is one micro-batch; what failed and what comes after it are several, which
    # have less padding, and of packed rows as many tokens
    assert computed[0] == at_once[0]
    for ours, theirs in zip(computed[1:], at_once[1:], strict=True):
        assert ours == theirs if packed else ours < theirs


def test_memory_may_run_out_again_and_in_a_step_of_adapters(base, tmp_path, capsys):
    options = ["loss=dpo", "adapter=lora", "sample_during_eval=false"]
    assert run(arguments(base, tmp_path / "whole", *options)) == 0
    capsys.readouterr()
    with failing(step, "accumulate_gradients", 2, 0.5, 1.7):
        assert run(arguments(base, tmp_path / "cut", *options)) == 0
    assert capsys.readouterr().err.count("computing them again") == 2
    name = "LATEST/adapter_model.safetensors"
    theirs = load_file(tmp_path / "whole" / name)
    for key, weight in load_file(tmp_path / "cut" / name).items():
        torch.testing.assert_close(weight, theirs[key], rtol=0, atol=1e-6, msg=key)


def test_held_out_rows_and_samples_are_computed_again_as_well(base, tmp_path, capsys):
    assert run(arguments(base, tmp_path / "whole", "loss=dpo")) == 0
    with failing(evaluation, "held_out_metrics", 2, 0.5), failing_samples():
        capsys.readouterr()
        assert run(arguments(base, tmp_path / "cut", "loss=dpo")) == 0
    error = capsys.readouterr().err
    assert error.count("computing them again") == 2 and "eval_batch_size" in error
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    samples = [(tmp_path / x / "samples.jsonl").read_text() for x in ("cut", "whole")]
    # drawn in other batches, one of them is another draw
    assert samples[0].count("\n") == samples[1].count("\n") > 0


@contextmanager
def failing_samples(*, times: float = 1) -> Iterator[None]:
    from fastpref.model.scorer import TokenScorer

    real, calls = TokenScorer.generate, []

    def generate(self: TokenScorer, *args: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) <= times:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, *args, **options)

    TokenScorer.generate = generate
    try:
        yield
    finally:
        TokenScorer.generate = real


def test_a_sample_that_memory_does_not_hold_is_not_told_to_keep_fewer_activations(
    base, tmp_path, capsys
):
    with failing_samples(times=float("inf")):
        assert run(arguments(base, tmp_path, "loss=dpo")) == 6
    assert "single row; a smaller max_length or more GPUs need less" in capsys.readouterr().err


def test_a_row_that_memory_does_not_hold_ends_the_run_with_what_would(base, tmp_path, capsys):
    many = [i / 100 for i in range(0, 3000, 3)]
    with failing(step, "accumulate_gradients", 2, *many):
        assert run(arguments(base, tmp_path / "run", "loss=dpo")) == 6
    error = capsys.readouterr().err
    assert "out of memory in a single row" in error and "activation_checkpointing=true" in error


def fail_on_rank_one(base: Path, run_dir: Path) -> None:
    import os

    def accumulate(*args: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*args)

    real = step.accumulate_gradients
    step.accumulate_gradients = accumulate
    code = run(arguments(base, run_dir, "loss=dpo", "parallel.timeout=30"))
    assert code == (6 if os.environ["RANK"] == "1" else 7), code


def test_among_ranks_it_ends_the_run_with_the_number_to_set(base, tmp_path, capfd):
    run_on_ranks(fail_on_rank_one, 2, base, tmp_path / "run")
    assert "tokens at once; set packing.max_tokens=" in capfd.readouterr().err


def test_a_run_that_goes_on_divides_its_steps_as_before(base, tmp_path, capsys):
    from stopped_runs import stopping_after

    command = arguments(base, tmp_path / "run", "loss=dpo", "sample_during_eval=false")
    with failing(step, "accumulate_gradients", 2, 0.5), stopping_after(2):
        assert run(command) == 75
    assert run([*command, "resume=auto"]) == 0
    assert run(arguments(base, tmp_path / "whole", "loss=dpo", "sample_during_eval=false")) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    from fastpref.checkpoint.folders import find_newest

    newest = find_newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    import json

    state = json.loads((newest.folder / "state.json").read_text())["record"]["state"]
    assert state["max_tokens"] < 8192


def repeat(size: int, holds: int, num_ranks: int = 1) -> list[list[int]]:
    """How a job of so many items of one token each is computed where memory holds some of them."""
    parts: list[list[int]] = []

    def compute(items: Any) -> list[int]:
        if len(items) > holds:
            raise MemoryError
        parts.append(list(items))
        return list(items)

    repetition = Repetition(num_ranks=num_ranks)
    found = repetition.compute_items(list(range(size)), compute, tokens=lambda _: 1)
    assert found == list(range(size))
    # the next job is not tried as a whole again
    parts.clear()
    repetition.compute_items(list(range(size)), compute, tokens=lambda _: 1)
    return parts


def test_items_are_halved_until_memory_holds_them_and_stay_so():
    assert repeat(8, 8) == [list(range(8))]
    assert repeat(8, 5) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [len(part) for part in repeat(9, 2)] == [2, 2, 2, 1, 2]
    assert repeat(4, 1) == [[0], [1], [2], [3]]
    with pytest.raises(MemoryExhaustedError, match="single row"):
        repeat(2, 0)
    with pytest.raises(RankMemoryError, match=r"8 tokens at once; set packing\.max_tokens=4"):
        repeat(8, 5, num_ranks=2)


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        # of a kernel that is loaded when torch's allocator has all there is
        ("Triton Error [CUDA]: out of memory", True),
        ("Triton Error [HIP]:  Code: 2, Messsage: out of memory", True),
        ("CUDA driver error: out of memory", True),
        ("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: misaligned address\na script that is out of memory", False),
    ],
)
def test_memory_that_ran_out_is_known_whoever_says_it(message, is_memory):
    assert is_out_of_memory(RuntimeError(message)) == is_memory


def test_one_item_of_many_tokens_is_not_divided():
    def fail(_: Any) -> list[int]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MemoryExhaustedError, match="single row"):
        Repetition(num_ranks=1).compute_items([1], fail, tokens=lambda _: 100)


def test_a_row_that_is_only_scored_is_not_told_to_keep_fewer_activations():
    with torch.no_grad(), pytest.raises(MemoryExhaustedError) as raised:
        repeat(1, 0)
    told = "out of memory in a single row; a smaller max_length or more GPUs need less"
    assert str(raised.value) == told


def test_memory_that_another_rank_ran_out_of_is_not_blamed_on_this_one():
    def wait(_: Any) -> list[int]:
        raise DistributedError("rank 1 ended: out of memory: CUDA out of memory. Tried to allocate")

    with pytest.raises(DistributedError, match=r"^rank 1 ended"):
        Repetition(num_ranks=2).compute_items([1, 2], wait, tokens=lambda _: 1)


def test_other_errors_are_none_of_its_business():
    def fail(_: Any) -> list[int]:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        Repetition(num_ranks=1).compute_items([1, 2], fail, tokens=lambda _: 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_nothing_of_a_backward_that_failed_is_held():
    held = list[int]()

    def compute(parts: list[int]) -> None:
        held.append(torch.cuda.memory_allocated())
        for num in parts:
            x = torch.ones(num, device="cuda", requires_grad=True)
            # three times as much until the backward, then two gradients
            x.neg().exp().exp().sum().backward()

    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + 2**30
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        _, parts = Repetition(num_ranks=1).compute(
            [2**26],
            compute,
            split=lambda parts, limit: [num // 2 for num in parts for _ in range(2)],
            size=max,
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert parts == [2**25, 2**25]
    assert len(held) == 2 and held[0] == held[1]
