"""That the benchmarks compare equal work on fair inputs; how fast it is done is theirs to say."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bench_head
import head_cases
import head_goals
import profile_step
import pytest
import torch
from head_contenders import CONTENDERS, JOBS, CannotRunError
from kl_contenders import KL_CONTENDERS, KL_JOBS


@pytest.fixture(scope="module", params=["tiny", "tiny-cap"])
def case(request):
    return head_cases.synthetic_case(request.param, 128, "cpu")


def test_synthetic_logits_have_the_statistics_of_a_trained_model(case):
    found = head_cases.statistics(case)
    assert found["mean_entropy"] == pytest.approx(head_cases.MEAN_ENTROPY, abs=0.2)
    # drawn from the model: the expected surprise is the entropy
    assert found["mean_target_logp"] == pytest.approx(-head_cases.MEAN_ENTROPY, abs=0.6)
    assert 1e-3 < found["share_above_2^-12"] < 0.2
    assert case.grad.unique().numel() == len(case.grad)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("contender", CONTENDERS.values(), ids=CONTENDERS)
def test_contenders_do_equal_work(case, job, contender):
    try:
        errors = bench_head.Oracle(case, job).errors(contender)
    except (CannotRunError, ImportError) as reason:
        pytest.skip(str(reason))
    # 16-bit logits of some peers are off by up to 0.1 nats
    exact = contender.name.startswith("fastpref")
    bounds = dict.fromkeys(
        ("logp_error", "logp_mean_error"), head_goals.LOGP_ERROR if exact else 0.2
    )
    for name, error in errors.items():
        assert error <= bounds.get(name, head_goals.GRADIENT_ERROR if exact else 0.05), name


@pytest.mark.parametrize("job", KL_JOBS)
@pytest.mark.parametrize("contender", KL_CONTENDERS.values(), ids=KL_CONTENDERS)
def test_contenders_over_two_models_do_equal_work(case, job, contender):
    if job not in contender.jobs:
        pytest.skip(f"no {job} job")
    oracle = bench_head.KLOracle(case, job)
    assert 1e-3 < oracle.kl.mean().item() < 1e-2
    try:
        errors = oracle.errors(contender)
    except (CannotRunError, ImportError) as reason:
        pytest.skip(str(reason))
    if contender.name.startswith("fastpref"):
        assert oracle.missed(errors) is None
    # a KL of 3e-3 from 16-bit logits
    assert errors.get("kl_error", 0.0) < 5e-4
    assert max(errors["value_error"], errors["input_grad_error"]) < 0.05


def test_a_run_leaves_a_table_a_plot_and_its_numbers(tmp_path):
    script = [sys.executable, bench_head.__file__, "--json", "--results", tmp_path]
    few = ["--shapes", "tiny", "--rows", "64", "--rounds", "1"]
    contenders = ["--contenders", "fastpref", "QuACK"]
    done = subprocess.run([*script, *few, *contenders], capture_output=True, text=True, check=True)
    assert "did not run: needs a GPU" in done.stdout or torch.cuda.is_available()
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / "head.json").read_text())
    assert {row["job"] for row in record["results"]} == {*JOBS, *KL_JOBS}
    timed = [row for row in record["results"] if row["contender"] == "fastpref"]
    assert all(row["milliseconds"] > 0 and row["extra_mib"] > 0 for row in timed)
    assert (folder / "head.md").read_text().count("\n| ") == len(record["results"]) + 2
    assert (folder / "head.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "name", ["bench_tdpo1_routes", "bench_weight_estimation", "planted_weights"]
)
def test_a_script_runs_as_its_docstring_says(name, monkeypatch):
    script = Path(bench_head.__file__).with_name(f"{name}.py")
    assert f"python benchmarks/{name}.py" in script.read_text()
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(script), run_name="__main__")


def test_missed_goals_are_listed_with_their_floor():
    row = {
        "shape": "S1",
        "rows": 16_384,
        "job": "forward",
        "contender": "fastpref",
        "milliseconds": 30.0,
        "extra_mib": 10.0,
        "pass_tflop": 17.2,
    }
    (line,) = head_goals.missed([row])
    assert "30.0 ms, goal 23" in line and "21.8" in line
    row["milliseconds"] = 22.9
    assert not head_goals.missed([row | {"logp_error": 2e-5}])
    assert head_goals.missed([row | {"logp_error": 8.7e-5}]) == [
        "S1 N=16384 forward fastpref, logp_error: 8.7e-05, goal 3e-05"
    ]
    slower = row | {"contender": "TRL", "job": "frozen", "milliseconds": 40.0}
    ours = row | {"job": "frozen", "milliseconds": 36.0}
    assert head_goals.missed([ours, slower]) == [
        "S1 N=16384 frozen fastpref / TRL, milliseconds: 0.90, goal 0.62"
    ]


def test_a_backward_in_a_thread_of_its_own_counts_for_the_backward():
    """As on a GPU, where the profiler gives a call what its own thread has launched alone."""
    backward = f"{profile_step.OF_AUTOGRAD}: MmBackward0"
    outer = SimpleNamespace(name=backward, cpu_parent=None, device_time_total=2e6)
    inner = SimpleNamespace(name=backward, cpu_parent=outer, device_time_total=1e6)
    forward = SimpleNamespace(name="aten::mm", cpu_parent=None, device_time_total=4e6)
    calls = [outer, inner, forward, outer]
    assert profile_step.backward_apart(calls, "device_time_total") == 4


def test_profiles_that_are_to_be_compared_leave_a_file_each():
    options = {"shape": "tiny", "law": "UF"}
    names = {
        profile_step.file_name(
            SimpleNamespace(rank=rank, reference=reference, compile=compile, **options)
        )
        for rank in (None, 16)
        for reference in ("online", "cache")
        for compile in (False, True)
    }
    assert len(names) == 8


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_the_rank_of_adapters_makes_no_process_of_several():
    # in place of a Python: what a program would find in its environment
    command = ["make", "bench-gpu", "PART=profile", "RANK=16", "PYTHON=env; :"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert "--rank 16" in done.stdout and "\nRANK=" not in done.stdout
