"""Rules for options on the command line that have no effect because of another option."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fastpref.config import (
    METHODS,
    Config,
    LossConfig,
    TDPOConfig,
    TISDPOConfig,
    TransformConfig,
)
from fastpref.data.sources.built_in import SOURCES
from fastpref.data.sources.files import HUB_ID
from fastpref.distributed import told_where_to_meet


class Rule(NamedTuple):
    """Options, and when they have no effect."""

    options: str
    """Their keys, separated by blanks."""
    is_idle: Callable[[Config], bool]
    """Whether a run with this config does not read them."""
    why: str
    """The reason in words, with options of the config in braces: {c.task}."""


def block_rules(transform: TransformConfig) -> Iterator[Rule]:
    """A rule for each transform method's block of options, which only that method reads."""
    for name in METHODS:
        if name == "origin":
            # it has no options
            continue
        keys = vars(getattr(transform, name))
        yield Rule(
            " ".join(f"transform.{name}.{key}" for key in keys),
            _takes_another(name),
            f"transform.method={{c.transform.method}}; transform.method={name} reads it",
        )


def _takes_another(name: str) -> Callable[[Config], bool]:
    return lambda c: c.loss.needs.weights and c.transform.method != name


def _are_elsewhere(names: Sequence[str], folder: str | None) -> bool:
    """Whether all datasets are built in or on the hub; one that does not exist is refused
    elsewhere."""
    return all(
        (name in SOURCES or HUB_ID.fullmatch(name)) and not (Path(folder or "") / name).is_dir()
        for name in names
    )


def _is_tdpo(loss: LossConfig, *, two: bool) -> bool:
    return isinstance(loss, TDPOConfig) and loss.if_tdpo2 == two


def _is_tisdpo(loss: LossConfig, *, token_level: bool) -> bool:
    return isinstance(loss, TISDPOConfig) and loss.token_level == token_level


RULES = (
    Rule(
        "loss.kl_metrics_every",
        lambda c: _is_tdpo(c.loss, two=True),
        "TDPO2 has its KL in every line",
    ),
    Rule(
        "loss.kl_metrics_every",
        lambda c: _is_tisdpo(c.loss, token_level=True),
        "with loss.token_level=true every line has the KL",
    ),
    Rule(
        "loss.kl_metrics_every",
        lambda c: (
            _is_tisdpo(c.loss, token_level=False) and c.reference.is_cached(c.loss, c.n_epochs)
        ),
        "reference.mode={c.reference.mode} keeps no reference to compute a KL with",
    ),
    Rule(
        "loss.alpha",
        lambda c: _is_tdpo(c.loss, two=False),
        "loss.if_tdpo2=false is TDPO1, which has no such weight",
    ),
    Rule(
        "loss.alpha",
        lambda c: _is_tisdpo(c.loss, token_level=False),
        "it weighs the KL, which loss.token_level=true adds",
    ),
    Rule(
        "data.eos_weight",
        lambda c: not c.loss.needs.weights,
        "loss={c.loss.name} takes no token weights",
    ),
    Rule(
        "model.revision",
        lambda c: Path(c.model.name_or_path).is_dir(),
        "{c.model.name_or_path} is a folder here",
    ),
    Rule(
        "resume.allow",
        lambda c: c.resume.path == "never" and c.task == "train",
        "resume=never begins anew",
    ),
    Rule(
        "wandb.entity wandb.project",
        lambda c: not c.wandb.enabled,
        "wandb.enabled=false",
    ),
    Rule(
        "wandb.enabled tensorboard.enabled",
        lambda c: c.debug and (c.wandb.enabled or c.tensorboard.enabled),
        "debug=true has neither wandb nor tensorboard follow",
    ),
    Rule(
        "base_data_dir",
        lambda c: _are_elsewhere(c.datasets, c.base_data_dir),
        "none of datasets={c.datasets} is a folder in {c.base_data_dir}",
    ),
    Rule(
        "fsdp_port",
        lambda c: c.trainer == "BasicTrainer",
        "trainer=BasicTrainer is one process, or torchrun's",
    ),
    Rule(
        "fsdp_port",
        lambda c: c.trainer == "FSDPTrainer" and told_where_to_meet(),
        "torchrun has been told where its processes meet",
    ),
    Rule(
        "output_dir",
        lambda c: bool(c.local_dirs),
        "local_dirs says where run folders are made",
    ),
    Rule(
        "output_dir local_dirs",
        lambda c: bool(c.run_dir) and not c.caches_reference,
        "run_dir is the run folder",
    ),
    Rule("exp_name", lambda c: bool(c.run_dir), "run_dir is the run folder"),
    Rule(
        "n_eval_model_samples",
        lambda c: not c.sample_during_eval,
        "sample_during_eval=false",
    ),
    Rule(
        "eval_every eval_batch_size n_eval_model_samples",
        lambda c: not c.n_eval_examples,
        "n_eval_examples=0 has no evaluation",
    ),
    Rule(
        "do_first_eval sample_during_eval",
        lambda c: not c.n_eval_examples and c.do_first_eval and c.sample_during_eval,
        "n_eval_examples=0 has no evaluation",
    ),
    Rule(
        "max_prompt_length data.truncation_mode",
        lambda c: c.data.truncation == "drop",
        "data.truncation=drop cuts nothing",
    ),
    Rule(
        "packing.share_prompt",
        lambda c: not c.packing.enabled,
        "packing.enabled=false",
    ),
    Rule(
        "model.attention",
        lambda c: not c.packing.enabled and c.model.attention in ("varlen", "flex"),
        "packing.enabled=false has padded rows, which the model computes by itself",
    ),
    Rule(
        "weights.positive weights.negative weights.output_dir weights.suffix",
        lambda c: c.task == "tisdpo",
        "task=tisdpo makes both models and the weights by itself, in its own folder; "
        "task=estimate_weights takes models that are there",
    ),
    Rule(
        "stages.contrast_beta",
        lambda c: c.task == "tisdpo" and c.stages.contrast != "dpo",
        "stages.contrast={c.stages.contrast} has no DPO",
    ),
    Rule(
        "stages.contrast_lr stages.contrast_n_epochs",
        lambda c: c.task == "tisdpo" and c.stages.contrast == "prompt",
        "stages.contrast=prompt trains no contrastive models",
    ),
    Rule(
        "stages.sft_lr stages.sft_n_epochs",
        lambda c: c.task == "tisdpo" and not c.stages.sft_first,
        "stages.sft_first=false",
    ),
)
