"""Child process of `bench_train_step`: trains steps with one system and measures them."""

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from machine import peak_resident_gib
from train_cases import read_rows


def config_of(case: dict[str, Any], run_dir: Path) -> Any:
    """fastpref's config for a case."""
    from fastpref.config import AdapterConfig, Config, DPOConfig, ModelConfig

    rank = case.get("rank")
    return Config(
        adapter=AdapterConfig(kind="lora", r=rank) if rank else AdapterConfig(),
        model=ModelConfig(
            name_or_path=case["model"],
            fsdp_policy_mp=None if case["dtype"] == "float32" else case["dtype"],
            liger=case.get("liger", "auto"),
        ),
        compile=case.get("compile", "false"),
        loss=DPOConfig(),
        datasets=[case["name"]],
        base_data_dir=case["data"],
        run_dir=str(run_dir),
        batch_size=case["pairs"],
        gradient_accumulation_steps=case["micro_batches"],
        n_epochs=None,
        n_examples=case["pairs"] * case["steps"],
        n_eval_examples=0,
        lr=case["lr"],
        warmup_steps=0,
        max_grad_norm=1.0,
        max_length=case["max_length"],
        max_prompt_length=case["max_length"] // 2,
        sample_during_eval=False,
        minimum_log_interval_secs=0.0,
    )


def run_fastpref(job: dict[str, Any]) -> dict[str, Any]:
    """Train with fastpref; the metrics of each step are read from its metrics.jsonl."""
    from fastpref.distributed import init_world
    from fastpref.train.task import train

    run_dir = Path(tempfile.mkdtemp()) / "run"
    config = config_of(job, run_dir)
    config.optim.weight_decay = 0.0
    config.packing.enabled = job["arm"] != "F0"
    config.packing.max_tokens = job["max_tokens"]
    if config.packing.enabled:
        # packed steps are split by max_tokens only
        config.gradient_accumulation_steps = 1
    config.packing.share_prompt = "true" if job["arm"] in ("F3", "F4") else "false"
    if job["arm"] == "F4":
        config.reference.mode = "cache"
        config.reference.cache_dir = str(run_dir.parent / "reference")
    saving = nullcontext() if "weights" in job else without_saving()
    with profiling(job.get("profile", False)) as profile, saying_memory() as memory, saving:
        train(config, init_world())
    records = read_rows(run_dir / "metrics.jsonl")
    seconds = [job["pairs"] / record["examples_per_second"] for record in records]
    if "weights" in job:
        name = "adapter_model.safetensors" if job.get("rank") else "model.safetensors"
        (run_dir / "LATEST" / name).rename(job["weights"])
    return {
        "seconds": seconds,
        "tokens": [
            round(record["tokens_per_second"] * s)
            for record, s in zip(records, seconds, strict=True)
        ],
        "losses": [record["loss/train"] for record in records],
        "grad_norms": [record["grad_norm"] for record in records],
        "peak_memory_gib": peak_memory_gib(),
        "memory": memory,
        "profile": profile,
    }


@contextmanager
def without_saving() -> Iterator[None]:
    """While entered, a training ends without its last checkpoint and the model's export: 16 bytes a
    parameter, which nothing here reads and a rented GPU would wait for."""
    from fastpref.train import task
    from fastpref.train.non_finite import raise_if_not_finite
    from fastpref.train.run import Run

    def finish(run: Run, *_: Any, **__: Any) -> float:
        raise_if_not_finite(run)
        run.log.flush()
        return run.seconds()

    with patch.object(task, "finish", finish):
        yield


@contextmanager
def saying_memory() -> Iterator[list[str]]:
    """Collect a run's log messages about memory: planned, measured, chosen."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text.startswith(("memory", "out of memory", "packing.max_tokens")):
                said.append(text)

    log, listener = logging.getLogger("fastpref"), Listener()
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    try:
        yield said
    finally:
        log.removeHandler(listener)


@contextmanager
def profiling(enabled: bool) -> Iterator[list[dict[str, Any]]]:
    """Collect the 20 most expensive operations, filled in at the end: name, calls, share."""
    import torch

    found: list[dict[str, Any]] = []
    if not enabled:
        yield found
        return
    with torch.profiler.profile() as profiler:
        yield found
    on_gpu = torch.cuda.is_available()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, field))
    total = sum(getattr(event, field) for event in events)
    found += [
        {"operation": event.key, "calls": event.count, "share": getattr(event, field) / total}
        for event in events[:20]
    ]


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    """Train with TRL on token ids; overrides only its tokenization, as that is done already."""
    import torch
    from datasets import Dataset
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOTrainer

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *arguments, **options):
            return dataset

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks, self.logs = [], []

        def on_train_begin(self, *arguments, **options):
            self.marks.append(now())

        def on_step_end(self, *arguments, **options):
            self.marks.append(now())

        def on_log(self, args, state, control, logs=None, **options):
            if "loss" in logs:
                self.logs.append(logs)

    rows = read_rows(Path(job["ids"]))
    lengths = [2 * len(r["prompt_ids"]) + len(r["chosen_ids"] + r["rejected_ids"]) for r in rows]
    if job["arm"] == "T6":
        rows = [row | {"length": length} for row, length in zip(rows, lengths, strict=True)]
    # not AutoTokenizer, which builds its own tokenizer for any folder of type qwen2
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    clock = Clock()
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        args=trl_options(job),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
        peft_config=lora_of(job) if job.get("rank") else None,
    )
    if "start" in job:
        set_peft_model_state_dict(trainer.model, load_file(job["start"]))
    trainer.train()
    if "weights" in job:
        tensors = trainer.model.state_dict()
        if job.get("rank"):
            tensors = get_peft_model_state_dict(trainer.model)
        save_file({name: weight.clone() for name, weight in tensors.items()}, job["weights"])
    return {
        "seconds": [b - a for a, b in zip(clock.marks, clock.marks[1:], strict=False)],
        "tokens": tokens_of_steps(job, lengths),
        "losses": [log["loss"] for log in clock.logs],
        "grad_norms": [log["grad_norm"] for log in clock.logs],
        "peak_memory_gib": peak_memory_gib(),
    }


def lora_of(job: dict[str, Any]) -> Any:
    """peft's equivalent of fastpref's default adapter."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=job["rank"],
        lora_alpha=2 * job["rank"],
        lora_dropout=0.0,
        target_modules="all-linear",
    )


def write_start(job: dict[str, Any], world: Any, path: Path) -> None:
    """Write the initial adapter of fastpref for a job, with peft's tensor names."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from fastpref.model.adapters.lora import adapter_state, add_adapters

    model = AutoModelForCausalLM.from_pretrained(job["model"])
    config = config_of(job, path)
    add_adapters(model, config.adapter, world, block_name=None, seed=config.seed)
    save_file({k: v.contiguous() for k, v in adapter_state(model).items()}, path)


def trl_options(job: dict[str, Any]) -> Any:
    """TRL's settings for an arm."""
    import torch
    from trl import DPOConfig

    grouped = job["arm"] == "T6"
    on_gpu = torch.cuda.is_available()
    return DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=job["pairs"] // job["micro_batches"],
        gradient_accumulation_steps=job["micro_batches"],
        precompute_ref_log_probs=job["arm"] in ("T2", "T6"),
        train_sampling_strategy="group_by_length" if grouped else "sequential",
        remove_unused_columns=not grouped,
        num_train_epochs=1,
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        max_length=None,
        beta=0.1,
        gradient_checkpointing=False,
        bf16=job["dtype"] == "bfloat16",
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=0,
        dataloader_pin_memory=on_gpu,
    )


def tokens_of_steps(job: dict[str, Any], lengths: list[int]) -> list[float]:
    """Real tokens of each step in a TRL arm."""
    pairs = job["pairs"]
    starts = range(0, len(lengths), pairs)
    if job["arm"] == "T6":
        # TRL's sampler by length composes the batches: only their mean is known here
        return [sum(lengths) / len(starts)] * len(starts)
    return [sum(lengths[start : start + pairs]) for start in starts]


def now() -> float:
    """Seconds on a clock that is read once all work on the GPU is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory_gib() -> float:
    """The allocator's peak on a GPU, peak resident memory on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_resident_gib()
