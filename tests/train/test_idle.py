"""Options that a command names and that do nothing there are said, and no others."""

import re

import pytest

import train
from fastpref.cli.options import all_options
from fastpref.cli.overrides import read_config, split_arguments
from fastpref.distributed import OWN_RUN_ID
from fastpref.train.logs.advice import Advice
from fastpref.train.logs.idle import RULES


def said(*arguments):
    config = read_config(list(arguments), train.compose_choices, train.CONFIG_DIR)
    return list(Advice(config).on_idle(split_arguments(list(arguments))[0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("loss=tdpo loss.kl_metrics_every=10", "loss.kl_metrics_every has no effect: TDPO2"),
        ("loss=tisdpo loss.token_level=true loss.kl_metrics_every=5", "every line has the KL"),
        (
            "loss=tisdpo loss.kl_metrics_every=5 reference.mode=cache",
            "loss.kl_metrics_every .* reference.mode=cache keeps no reference",
        ),
        ("loss=tdpo loss.if_tdpo2=false loss.alpha=0.5", "loss.alpha has no effect: .* is TDPO1"),
        ("loss=tisdpo loss.alpha=0.9", "loss.alpha .* loss.token_level=true adds"),
        ("loss=dpo data.eos_weight=1", "data.eos_weight .* loss=dpo takes no token weights"),
        ("model.name_or_path=/ model.revision=main", "model.revision .*: / is a folder here"),
        ("resume.allow=[lr]", "resume.allow .* begins anew"),
        ("wandb.entity=me", "wandb.entity has no effect: wandb.enabled=false"),
        ("debug=true wandb.enabled=true", "wandb.enabled has no effect: debug=true"),
        ("base_data_dir=/tmp", r"base_data_dir .*: none of datasets=.*planted.* is a folder in"),
        ("datasets=[org/name] base_data_dir=/tmp", r"base_data_dir .*: none of .*org/name.* is a"),
        ("fsdp_port=1234", "fsdp_port has no effect: trainer=BasicTrainer"),
        ("local_dirs=[/a] output_dir=b", "output_dir has no effect: local_dirs"),
        ("run_dir=a output_dir=b", "output_dir has no effect: run_dir is"),
        ("run_dir=a exp_name=b", "exp_name has no effect: run_dir is"),
        ("n_eval_examples=0 eval_every=32", "eval_every has no effect: n_eval_examples=0"),
        ("n_eval_examples=0 eval_batch_size=8", "eval_batch_size has no effect: n_eval_examples=0"),
        ("n_eval_examples=0 do_first_eval=true", "do_first_eval has no effect: n_eval_examples=0"),
        ("sample_during_eval=false n_eval_model_samples=2", "n_eval_model_samples has no effect"),
        ("data.truncation=drop max_prompt_length=9", "max_prompt_length has no effect: .*=drop"),
        ("packing.enabled=false packing.share_prompt=auto", "packing.share_prompt has no effect"),
        ("packing.enabled=false model.attention=flex", "model.attention .*: .* padded rows"),
        ("loss=tisdpo transform.paper.k=2", "transform.paper.k .* transform.method=paper reads it"),
        ("recipe=tisdpo_d weights.positive=a", "weights.positive .* task=estimate_weights takes"),
        ("recipe=tisdpo_s stages.contrast_beta=1", "stages.contrast_beta .*=sft has no DPO"),
        ("recipe=tisdpo_p stages.contrast_lr=1", "stages.contrast_lr .* no contrastive models"),
        ("recipe=tisdpo_d stages.sft_lr=1", "stages.sft_lr has no effect: stages.sft_first=false"),
    ],
)
def test_an_option_that_another_one_leaves_nothing_to_do_is_said(arguments, message, monkeypatch):
    monkeypatch.setattr("fastpref.config.trackers.find_spec", lambda package: package)
    [line] = said(*arguments.split())
    assert re.search(message, line)


def test_torchrun_says_by_itself_where_processes_meet(monkeypatch):
    # the command's own torchrun hands the option on
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", OWN_RUN_ID)
    assert not said("trainer=FSDPTrainer", "fsdp_port=1234")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    [line] = said("trainer=FSDPTrainer", "fsdp_port=1234")
    assert line.startswith("fsdp_port has no effect: torchrun has been told")


@pytest.mark.parametrize(
    "arguments",
    [
        "loss=tdpo loss.alpha=0.9",
        "datasets=[nowhere] base_data_dir=/tmp",
        "packing.enabled=false model.attention=eager",
        "loss=tisdpo loss.token_level=true loss.alpha=0.9",
        "loss=tisdpo transform=aggressive",
        "loss=tisdpo transform.method=paper transform.paper.k=2",
        "loss=dpo run_dir=a output_dir=b reference.mode=cache",
        "resume=auto resume.allow=[lr]",
        "packing.share_prompt=true",
        "recipe=tisdpo_d resume.allow=[lr] stages.sft_first=true stages.sft_lr=1",
        "n_eval_examples=0 do_first_eval=false",
        "recipe=tisdpo_d stages.contrast_beta=1 stages.contrast_lr=1 weights.round=2",
    ],
)
def test_nothing_is_said_of_options_that_are_read(arguments):
    assert said(*arguments.split()) == []


def test_a_group_that_the_task_does_not_read_is_not_said_option_by_option():
    assert said("stages.contrast=sft", "stages.contrast_beta=1") == []


def test_rules_are_of_options_that_there_are():
    assert {key for rule in RULES for key in rule.options.split()} <= set(all_options())
