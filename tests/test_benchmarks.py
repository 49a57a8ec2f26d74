"""That the benchmarks compare equal work on fair inputs; how fast it is done is theirs to say."""

import importlib
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bench_head
import bench_train_step
import head_cases
import head_contenders
import head_goals
import profile_step
import pytest
import torch
import torch.distributed as dist
import train_children
import train_gate
from fastpref_kernels.gemm_tiles import FUSED_TILES, JOINT_TILES
from head_contenders import CONTENDERS, JOBS, CannotRunError
from kl_contenders import KL_CONTENDERS, KL_JOBS
from safetensors.torch import save_file


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


def test_both_routes_of_tdpo1_compute_the_same_steps(monkeypatch, capsys):
    script = Path(bench_head.__file__).with_name("bench_tdpo1_routes.py")
    options = ["--steps", "3", "batch_size=8", "n_examples=24", "n_eval_examples=0"]
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        dist.destroy_process_group()
    printed = capsys.readouterr().out
    assert "joint: " in printed and "values: " in printed and "ratio: " in printed


def test_what_is_measured_stays_when_a_later_case_ends_the_run(tmp_path, monkeypatch):
    rows = ["--rows", "32", "64", "--rounds", "1", "--contenders", "fastpref"]
    script = [bench_head.__file__, "--shapes", "tiny", "--jobs", "forward", *rows]
    monkeypatch.setattr(sys, "argv", [*script, "--json", "--results", str(tmp_path)])
    make = bench_head.synthetic_case

    def run_out_of_memory(name, rows, device):
        if rows == 64:
            raise MemoryError
        return make(name, rows, device)

    monkeypatch.setattr(bench_head, "synthetic_case", run_out_of_memory)
    with pytest.raises(MemoryError):
        bench_head.main()
    (numbers,) = tmp_path.rglob("head.json")
    assert [row["rows"] for row in json.loads(numbers.read_text())["results"]] == [32]


@pytest.mark.parametrize("passing", [0, 2])
def test_a_peer_that_fails_without_a_word_or_only_when_timed_is_a_result(
    case, passing, monkeypatch
):
    calls = 0

    def score(input, weight, target, softcap):
        nonlocal calls
        calls += 1
        # once for the errors, once for the memory
        assert calls <= passing
        return head_contenders.eager(input, weight, target, softcap)

    peer = head_contenders.Contender("peer", score)
    contenders = {"peer": peer, "fastpref": CONTENDERS["fastpref"]}
    monkeypatch.setattr(bench_head, "CONTENDERS", contenders)
    arguments = SimpleNamespace(
        contenders=list(contenders), device="cpu", end=math.inf, rounds=1, seconds_budget=9.0
    )
    theirs, ours = bench_head.measure_job(case, "forward", arguments)
    assert theirs["failure"].startswith("AssertionError") and "milliseconds" not in theirs
    assert ours["milliseconds"] > 0 and "failure" not in ours


def test_further_rounds_end_with_the_time():
    arguments = SimpleNamespace(device="cpu", end=-math.inf, rounds=5)
    seconds, failures = bench_head.interleave({"ours": lambda: None}, arguments)
    assert len(seconds["ours"]) == 1 and not failures


def test_an_error_that_is_no_number_exceeds_every_bound(case):
    row = {"shape": "S1", "rows": 4096, "job": "forward", "contender": "fastpref"}
    row |= {"milliseconds": 1.0, "extra_mib": 1.0, "logp_error": math.nan}
    assert "nan" in bench_head.Oracle(case, "forward").missed(row)
    assert "nan" in "".join(head_goals.missed([row]))


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


def test_the_tile_that_a_sweep_calls_present_is_that_of_the_table():
    pytest.importorskip("triton", reason="Triton is for Linux")
    sweep_tiles = importlib.import_module("sweep_tiles")
    present = {c.job: c.tile for c in sweep_tiles.CANDIDATES if c.name.endswith("now")}
    tables = {"joint": JOINT_TILES, "joint kept": JOINT_TILES}
    jobs = ("forward", "joint", "joint kept", "kept", "lean")
    assert present == {job: tables.get(job, FUSED_TILES)["sm_90"] for job in jobs}


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


def test_a_peer_that_cannot_be_imported_is_absent_from_the_steps(tmp_path, monkeypatch):
    # the first of the libraries that TRL's arm imports
    broken = tmp_path / "datasets" / "__init__.py"
    broken.parent.mkdir()
    broken.write_text("raise ImportError('needs a newer torch')")
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    theirs = train_children.Children(tmp_path, None).outcome({"arm": "T1"})
    assert theirs == {"arm": "T1", "absent": "needs a newer torch"}
    ours = {"arm": "F3", "tokens_per_second": 9.0, "peak_memory_gib": 1.0}
    arguments = SimpleNamespace(arms=["T1", "F3"], json=False)
    (line,) = bench_train_step.report(arguments, {}, {}, [theirs, ours], [])[2:]
    assert line.startswith("| F3 | 9 ")


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_an_arm_ends_with_the_time(seconds, tmp_path):
    children = train_children.Children(tmp_path, seconds)
    assert children.outcome({"arm": "F3"})["absent"].startswith("the time is over")


@pytest.mark.parametrize("missing", ["--model", "--data"])
def test_a_folder_that_is_missing_ends_the_steps_before_they_cost_time(
    missing, tmp_path, monkeypatch, capsys
):
    folders = {"--model": tmp_path, "--data": tmp_path} | {missing: tmp_path / "nowhere"}
    options = [part for name, path in folders.items() for part in (name, str(path))]
    monkeypatch.setattr(sys, "argv", ["bench_train_step.py", *options])
    with pytest.raises(SystemExit, match=r"^2$"):
        bench_train_step.parse_arguments()
    assert f"no folder {tmp_path / 'nowhere'}" in capsys.readouterr().err


def test_a_gradient_norm_that_is_no_number_is_not_equal(tmp_path):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "T1.safetensors")
    save_file({"w": torch.ones(2, 2)}, tmp_path / "F3.safetensors")
    theirs, ours = ({"arm": arm, "losses": [0.7, 0.6]} for arm in ("T1", "F3"))
    theirs["grad_norms"], ours["grad_norms"] = [1.0, 1.0], [1.0, math.nan]
    gate = train_gate.differences(theirs, ours, tmp_path)
    assert gate.pop("losses") == gate.pop("weights") == gate.pop("a_matrix") == 0
    assert not train_gate.passes(gate | {"losses": 0, "weights": 0, "a_matrix": 0})


def test_steps_that_are_to_be_compared_leave_a_file_each():
    names = {
        bench_train_step.name_of(
            SimpleNamespace(shape=shape, law="UF", rank=rank, compile=compile), "UF"
        )
        for shape in (None, "tiny")
        for rank in (None, 16)
        for compile in ("false", "true", "auto")
    }
    assert len(names) == 12


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("part", ["train", "profile"])
@pytest.mark.parametrize(("given", "taken"), [("false", "false"), ("1", "true")])
def test_what_the_command_line_of_make_says_is_done(part, given, taken):
    options = [f"PART={part}", "RANK=16", f"COMPILE={given}"]
    command = ["make", "bench-gpu", *options, "PYTHON=env; :"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert "--rank 16" in done.stdout and f"--compile {taken}" in done.stdout


def test_a_profile_is_compiled_as_the_command_line_says(monkeypatch):
    def compile_of(*options: str) -> bool | str:
        monkeypatch.setattr(sys, "argv", ["profile_step.py", *options])
        return profile_step.parse_arguments().compile

    assert compile_of() is False and compile_of("--compile") is True
    assert compile_of("--compile", "false") is False
    assert compile_of("--compile", "auto") == "auto"


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_the_rank_of_adapters_makes_no_process_of_several():
    # in place of a Python: what a program would find in its environment
    command = ["make", "bench-gpu", "PART=profile", "RANK=16", "PYTHON=env; :"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert "--rank 16" in done.stdout and "\nRANK=" not in done.stdout
