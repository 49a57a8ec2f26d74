"""The arithmetic of a device: on a CPU in 16 bits only where it has units for them."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from fastpref_kernels.gemm import cpu_multiplies_bfloat16
from stopped_runs import run
from tiny_models import read_metrics, save_dataset, save_tiny_model

from fastpref.config import ModelConfig
from fastpref.distributed import init_world
from fastpref.model import precision
from fastpref.model.precision import precision_here

HAS_UNITS = precision.has_units


@pytest.fixture
def world():
    yield init_world()
    dist.destroy_process_group()


UNITS = "fastpref.model.precision.has_units"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cpu_without_units_computes_in_float32(world, monkeypatch, dtype):
    monkeypatch.setattr(UNITS, lambda dtype: dtype == "float32")
    options = ModelConfig(name_or_path="tiny", fsdp_policy_mp=dtype)
    assert precision_here(options, world).compute_dtype == "float32"
    # as the masters, which stay what they are
    masters = ModelConfig(name_or_path="tiny", fsdp_policy_mp=None, policy_dtype=dtype)
    here = precision_here(masters, world)
    assert (here.compute_dtype, here.policy_dtype) == ("float32", dtype)
    gpu = replace(world, device=torch.device("cuda"))
    assert precision_here(options, gpu) is options
    monkeypatch.setattr(UNITS, lambda dtype: True)
    assert precision_here(options, world) is options


def test_units_are_what_the_cpu_says(monkeypatch):
    says = {"avx512_fp16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: says)
    assert HAS_UNITS("float32") and HAS_UNITS("float16")
    says.clear()
    assert HAS_UNITS("float32") and not HAS_UNITS("float16")
    # asked once a process
    has_bfloat16 = cpu_multiplies_bfloat16.__wrapped__
    assert not has_bfloat16()
    for name in ("amx_bf16", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        assert has_bfloat16()


def test_a_run_computes_so_and_goes_on_where_there_are_units(tmp_path, monkeypatch):
    save_dataset(tmp_path, "words", num_train=16, num_test=4)
    save_tiny_model(tmp_path / "model")
    command = [
        *("model=blank_model", f"model.name_or_path={tmp_path / 'model'}", "datasets=[words]"),
        *(f"base_data_dir={tmp_path}", "max_length=64", "max_prompt_length=32", "batch_size=8"),
        *("n_eval_examples=0", "warmup_steps=0", "minimum_log_interval_secs=0", "resume=auto"),
    ]
    monkeypatch.setattr(UNITS, lambda dtype: dtype == "float32")
    exact = [*command, "model.fsdp_policy_mp=null", "n_epochs=1", f"run_dir={tmp_path / 'exact'}"]
    assert run(exact) == 0
    command += ["model.fsdp_policy_mp=bfloat16", f"run_dir={tmp_path / 'run'}"]
    assert run([*command, "n_epochs=1"]) == 0
    expected, records = (read_metrics(tmp_path / name, "train") for name in ("exact", "run"))
    for name in ("loss/train", "logps_train/chosen", "grad_norm"):
        assert [x[name] for x in records] == [x[name] for x in expected]
    options = (tmp_path / "run" / "config.yaml").read_text()
    assert "fsdp_policy_mp: bfloat16" in options
    monkeypatch.setattr(UNITS, lambda dtype: True)
    assert run([*command, "n_epochs=2"]) == 0
    assert len(read_metrics(tmp_path / "run", "train")) == 4
