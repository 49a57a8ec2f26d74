"""Which options of two starts differ."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from ranks import ALONE
from small_data import byte_tokenizer

from fastpref.checkpoint.manifest import Checkpoint, Manifest
from fastpref.cli.resume_names import check_resume
from fastpref.config import (
    AdapterConfig,
    Config,
    DPOConfig,
    HeadConfig,
    ModelConfig,
    ResumeConfig,
)
from fastpref.errors import CheckpointError, ConfigError
from fastpref.train.resume.comparison import FORMAT, check_record, check_same_run
from fastpref.train.resume.differences import (
    Difference,
    effect_of,
    is_among,
    is_of_state,
    list_differences,
)
from fastpref.train.resume.fingerprints import split_digest, take_digests
from fastpref.train.resume.start import Start
from fastpref.train.state import RunState


def options(**changes) -> dict:
    model = ModelConfig(name_or_path="tiny")
    return asdict(Config(model=model, loss=DPOConfig(beta=0.1), **changes))


def test_another_vocabulary_or_chat_template_is_another_tokenizer():
    tokenizers = byte_tokenizer(), byte_tokenizer()
    tokenizers[1].add_tokens(["new"])
    texts = [(tokenizer, template) for tokenizer in tokenizers for template in (None, "a", "b")]
    digests = [take_digests([None, None], of_texts, ALONE) for of_texts in texts]
    assert len({of_run.pop("tokenizer") for of_run in digests}) == len(texts)
    assert digests == [{"data": "none", "held-out data": "none"}] * len(texts)


def test_other_borders_of_rows_or_of_prompts_are_other_data():
    borders = ([[1, 2], [3]], [[1], [2, 3]])
    splits = [
        SimpleNamespace(groups=groups, dataset=Dataset.from_dict({"prompt_ids": rows}))
        for rows in borders
        for groups in ([0, 0], [0, 1])
    ]
    assert len({split_digest(split) for split in splits}) == 4


def test_what_an_earlier_version_did_not_have_was_what_it_is_by_default():
    before = options()
    del before["adapter"], before["plan"], before["packing"]["max_tokens"]
    del before["model"]["liger"]
    assert list_differences(before, options()) == []
    now = options(adapter=AdapterConfig(kind="lora", r=4))
    assert list_differences(before, now) == [
        Difference("adapter.kind", "none", "lora"),
        Difference("adapter.r", None, 4),
    ]


def test_a_checkpoint_of_an_earlier_version_has_no_digest_of_held_out_rows():
    record = {"options": options(), "fingerprints": {"data": "a"}}
    now = {"data": "a", "held-out data": "b"}
    check_same_run(Path("step-3"), record, options(), now, allow=[])
    with pytest.raises(CheckpointError, match=r"data was a, is c: CHANGES THE NUMBERS"):
        check_same_run(Path("step-3"), record, options(), now | {"data": "c"}, allow=[])


def test_a_group_is_not_every_option_whose_name_begins_with_its_own():
    assert is_among("optim.schedule", ["optim"]) and is_among("data", ["data"])
    assert not is_among("optimizer", ["optim"]) and not is_among("datasets", ["data"])


def test_a_state_of_adapters_fits_other_adapters_and_no_other_weights():
    def of_state(before: str, now: str) -> bool:
        return is_of_state(Difference("adapter.kind", before, now), adapted=True)

    assert of_state("none", "lora") and of_state("qlora", "none")
    assert not of_state("lora", "qlora")


def test_what_is_done_about_a_step_that_is_not_finite_changes_no_other_step():
    said = effect_of(Difference("on_nonfinite", "stop", "skip"), "cosine")
    assert said == "no effect on the updates"


def test_a_state_that_does_not_fit_is_not_accepted_by_allowing_it():
    record = {"options": options(optimizer="RMSprop"), "fingerprints": {}}
    message = (
        r"RMSprop, is AdamW: allowed\nset them back or name a new run_dir .* another optimizer$"
    )
    with pytest.raises(CheckpointError, match=message):
        check_same_run(Path("step-3"), record, options(), {}, allow=["optimizer"])


def test_what_only_another_version_has_cannot_be_set_back():
    record = {"options": options() | {"curriculum": "none"}, "fingerprints": {}}
    for changes, advice in {
        (): r"\ngo on with the version that has them, name .* resume\.allow=\[curriculum\]$",
        (("lr", 1.0),): r"\nset them back, name .* resume\.allow=\[curriculum,lr\]$",
    }.items():
        with pytest.raises(CheckpointError, match=advice):
            check_same_run(Path("step-3"), record, options(**dict(changes)), {}, allow=[])


def test_groups_and_options_of_earlier_starts_may_be_allowed(tmp_path):
    (tmp_path / "config.yaml").write_text("curriculum:\n  kind: none\n")
    names = ["optim", "lr", "data", "curriculum", "curriculum.kind"]
    check_resume(ResumeConfig(allow=names), tmp_path)
    with pytest.raises(ConfigError, match=r"there is no option curriculum, curriculum\.kind$"):
        check_resume(ResumeConfig(allow=names), None)


def test_tokens_at_once_are_taken_over_only_where_they_were_found_out():
    state = RunState(max_tokens=4096, place="1 x cuda, activations kept")
    assert state.tokens_found("1 x cuda, activations kept") == 4096
    assert state.tokens_found("2 x cuda, activations kept") is None
    assert RunState().tokens_found("") is None


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"eval_every": 99, "n_examples": 99, "base_data_dir": "elsewhere"}, True),
        ({"activation_checkpointing": True}, False),
        ({"head": HeadConfig(workspace_mib=64)}, False),
        ({"optimizer": "RMSprop"}, False),
    ],
)
def test_tokens_at_once_are_taken_over_only_by_a_step_of_the_same_memory(change, fits):
    state = RunState(step=1, examples=8, max_tokens=4096, place="2 x cuda")
    record = {"state": state.to_json(), "options": options()}
    start = Start(agreement=None, place=None, record=record)
    assert start.tokens_found("2 x cuda", options(**change)) == (4096 if fits else None)
    assert start.tokens_found("4 x cuda", options(**change)) is None
    assert Start(agreement=None, place=None).tokens_found("2 x cuda", options()) is None


def test_a_checkpoint_beyond_the_end_of_the_run_is_refused():
    manifest = Manifest(step=3, world_size=1, metrics={}, files={})
    start = Start(
        agreement=None,
        place=None,
        checkpoint=Checkpoint(Path("step-00000003"), manifest),
        record={"state": RunState(step=3, examples=24).to_json()},
    )
    start.check_length(3)
    with pytest.raises(CheckpointError, match="step-00000003 is of step 3, the run has 2 steps"):
        start.check_length(2)


def test_a_record_of_another_version_is_read_or_refused_by_what_it_lacks_or_has():
    state = RunState(step=3, examples=24).to_json()
    record = {"format": FORMAT, "state": state, "options": {}, "fingerprints": {}}

    def check(**changes) -> None:
        check_record(Path("step-00000003"), record | changes)

    # an earlier one
    check(state={name: state[name] for name in ("step", "examples", "guard")})
    for problem, changes in {
        "its format is another one": {"format": FORMAT + 1},
        "unexpected keyword argument 'curriculum'": {"state": state | {"curriculum": 3}},
        "takes from 1 to 3 positional arguments": {"state": state | {"guard": [0, 0, 0]}},
        "KeyError: 'step'": {"state": {"guard": [0, 0]}},
    }.items():
        with pytest.raises(CheckpointError, match=problem):
            check(**changes)
    del record["fingerprints"]
    with pytest.raises(CheckpointError, match="another version of fastpref"):
        check()
