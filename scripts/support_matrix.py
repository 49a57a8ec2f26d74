"""Tests which model families train: python scripts/support_matrix.py [FAMILY ...].

Takes a tiny random float32 model of every family of the installed transformers with a language
model through a run: its scores are compared with plain transformers in float64, the first DPO loss
with ln 2; after one optimizer step the export is scored by plain transformers. Multimodal models
are scored by their full class, and untrained parts must be unchanged in the export.
Writes `docs/support-matrix.md`; if families are given, prints their lines instead.
"""

import argparse
import json
import logging
import math
import multiprocessing
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from support_document import LOSS_BOUND, SCORE_BOUND, Entry, format_document
from support_scores import largest_difference, plain_scores, score_held_out
from tiny_families import EVERY, VOCABULARY, build_tiny
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from fastpref.checkpoint.agreement import Agreement
from fastpref.config import AdapterConfig, Config, DPOConfig, ModelConfig
from fastpref.distributed import World, init_world
from fastpref.errors import FastprefError
from fastpref.model.attention.rules import ScoreRules
from fastpref.model.files.families import other_parts
from fastpref.model.files.paths import resolve_model
from fastpref.model.files.reading import reason
from fastpref.model.mixers import describe_mixers
from fastpref.model.scorer import TokenScorer
from fastpref.train.build import build_run
from fastpref.train.export.latest import export_model
from fastpref.train.resume.start import find_start
from fastpref.train.run import Run
from fastpref.train.run_folder import run_place
from fastpref.train.step import train_step

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "support-matrix.md"
SECONDS = 300
"""Timeout per family; most take two seconds."""
WORDS = ["the", "one", "red", "cat", "sees", "old"]


def check_family(family: str, world: World, folder: Path) -> Entry:
    """Take one family through a run.

    Args:
        family: Model type in transformers.
        world: World of a single process.
        folder: Working folder.
    """
    try:
        save_model(family, folder / "model")
    # raised by the family's own code, which may not support these sizes
    except Exception as error:
        return Entry(family, "not built", remark=reason(error))
    write_rows(folder / "words")
    said: list[str] = []
    handler = _Collector(said)
    logging.getLogger("fastpref").addHandler(handler)
    try:
        return _run_family(family, world, folder, said)
    except FastprefError as error:
        return Entry(family, "refused", remark=str(error).replace(str(folder / "model"), family))
    except Exception as error:
        return Entry(family, "differs", remark=reason(error))
    finally:
        logging.getLogger("fastpref").removeHandler(handler)


def check_apart(family: str) -> Entry:
    """`check_family` in a child process, so that a crash becomes an entry of the matrix."""
    # fork: the child has everything imported
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_check_and_send, args=(family, theirs))
    child.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(SECONDS) else Entry(family, "differs", remark="no end")
    except EOFError:
        child.join()
        return Entry(family, "differs", remark=f"the process ended with {child.exitcode}")
    finally:
        child.kill()
        child.join()


def _check_and_send(family: str, connection: Any) -> None:
    world = init_world()
    with tempfile.TemporaryDirectory() as folder:
        connection.send(check_family(family, world, Path(folder)))
    dist.destroy_process_group()


def save_model(family: str, folder: Path) -> None:
    """Save a tiny random model of the family, with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("tiny"))
    assert len(tokenizer) <= VOCABULARY
    model = build_tiny(family)
    # `save_pretrained` rejects some families' default generation config
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(folder: Path) -> None:
    """Write eight pairs with two prompts, the same in both splits."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "prompt": f"Say {i % 2}: {WORDS[i % 2]} {WORDS[2]}.",
            "chosen": f" {' '.join(WORDS[: 1 + i % 5])}.",
            "rejected": f" {' '.join(WORDS[::-1][: 2 + i % 4])}!",
        }
        for i in range(8)
    ]
    for split in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


class Trained(NamedTuple):
    """Result of one optimizer step of a family."""

    run: Run
    score_error: float
    loss_error: float
    export_error: float
    is_right: bool
    asked: set[str]


def _run_family(family: str, world: World, folder: Path, said: Sequence[str]) -> Entry:
    trained = _train(folder, world, folder / "run", AdapterConfig())
    run = trained.run
    reasons = [_reason(line) for line in said if "cannot be trained on packed rows" in line]
    attention = run.policy.attention
    modules = run.policy.model.modules() if attention else ()
    # layers that process the sequences of a packed row one by one
    mixers = [module for module in modules if hasattr(module.forward, "isolated")]
    return Entry(
        family,
        "trains" if trained.is_right else "differs",
        type(run.policy.model).__name__.removeprefix("FSDP"),
        run.train.layout.name,
        attention.name if attention else "its own",
        tuple(sorted(trained.asked)),
        describe_mixers(mixers),
        _adapters(folder, world),
        *trained[1:4],
        wrapper=_other_parts(run.policy.model),
        remark=reasons[0] if reasons else "",
    )


def _train(folder: Path, world: World, run_dir: Path, adapter: AdapterConfig) -> Trained:
    config = Config(
        model=ModelConfig(name_or_path=str(folder / "model"), fsdp_policy_mp=None),
        loss=DPOConfig(),
        datasets=["words"],
        base_data_dir=str(folder),
        run_dir=str(run_dir),
        batch_size=8,
        eval_batch_size=8,
        n_eval_examples=8,
        max_length=64,
        max_prompt_length=32,
        lr=1e-3,
        warmup_steps=0,
        sample_during_eval=False,
        adapter=adapter,
    )
    run = build_run(config, world, find_start("never", run_place(config), Agreement(world)))
    try:
        with listening(run.policy) as asked:
            sequences, ours = score_held_out(run)
        source = folder / "model"
        score_error = largest_difference(ours, plain_scores(source, source, sequences))
        names, values, _ = train_step(run, run.train.step(0, world), 0)
        first = dict(zip(names, values.tolist(), strict=True))
        _, trained = score_held_out(run)
        exported = export_model(run.policy, run.export, run.run_dir, world)
        export_error = largest_difference(trained, plain_scores(exported, source, sequences))
    finally:
        run.log.close()
    if not adapter.trained:
        check_names(folder / "model", exported, other_parts(run.policy.model))
    loss_error = abs(first["loss/train"] - math.log(2))
    fits = score_error <= SCORE_BOUND and export_error <= SCORE_BOUND and loss_error <= LOSS_BOUND
    moves = math.isfinite(first["grad_norm"]) and first["grad_norm"] > 0
    return Trained(run, score_error, loss_error, export_error, fits and moves, asked)


def check_names(source: Path, exported: Path, parts: Sequence[str]) -> None:
    """Check that an export has its source's tensor names, and untrained parts the same bits.

    Args:
        source, exported: Model folders.
        parts: Names of the untrained parts.

    Raises:
        ValueError: naming tensors that differ.
    """
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (source, exported))
    differing = sorted(theirs.keys() ^ ours.keys())
    stems = [part.rpartition(".")[2] for part in parts]
    for name in theirs.keys() & ours.keys():
        if any(stem in name.split(".") for stem in stems):
            differing += [] if torch.equal(ours[name], theirs[name]) else [name]
    if differing:
        raise ValueError(f"the export has other tensors than its source: {differing[:4]}")


def _other_parts(model: Any) -> str:
    """Names of a multimodal model's parts beside text."""
    return ", ".join(name.rpartition(".")[2] for name in other_parts(model))


def _adapters(folder: Path, world: World) -> str:
    """Return "yes" if training adapters passes the same checks, else the reason."""
    try:
        trained = _train(folder, world, folder / "adapters", AdapterConfig(kind="lora", r=2))
    except Exception as error:
        return reason(error).replace(str(folder / "model"), "it")
    return "yes" if trained.is_right else f"export off by {trained.export_error:.1e} nats"


@contextmanager
def listening(policy: TokenScorer) -> Iterator[set[str]]:
    """Collect the features that layers request from packed attention: window, sinks, softcap."""
    asked: set[str] = set()
    attention = policy.attention
    if attention is None:
        yield asked
        return

    def attend(query: Tensor, key: Tensor, value: Tensor, layout: Any, rules: ScoreRules) -> Tensor:
        given = {"window": rules.window, "sinks": rules.sinks, "softcap": rules.softcap}
        asked.update(name for name, value in given.items() if value is not None)
        return attention.attend(query, key, value, layout, rules)

    policy.attention = replace(attention, attend=attend)
    try:
        yield asked
    finally:
        policy.attention = attention


class _Collector(logging.Handler):
    """Collects log messages."""

    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())


def _reason(line: str) -> str:
    return line.partition("packed rows: ")[2].removesuffix("; taking padded ones")


def main() -> None:
    """Check the given families; without any, all of them, and write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="model types of transformers")
    named = parser.parse_args().families
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("fastpref").setLevel(logging.INFO)
    logging.getLogger("fastpref").propagate = False
    entries = []
    for family in named or EVERY:
        entries.append(check_apart(family))
        print(*(str(value) for value in entries[-1]), sep="  ", flush=True)
    if not named:
        DOCUMENT.write_text(format_document(entries), encoding="utf-8")


if __name__ == "__main__":
    main()
