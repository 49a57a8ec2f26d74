"""`task=plan`: a table for GPUs that need not be here, by the rules of a run."""

import importlib.util
from pathlib import Path

import pytest
from stopped_runs import run
from tiny_models import save_tiny_model
from transformers import AutoConfig

from fastpref.config import AdapterConfig
from fastpref.memory.plan import GIB
from fastpref.model.replicate import is_replicated


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """8.03 G weights: 29.92 GiB in float32, 14.96 in bfloat16, on eight GPUs 3.74 and 1.87."""
    return save_llama(tmp_path_factory.mktemp("8b"), 32)


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """Four layers of it, 1.92 G weights: 3.58 GiB in bfloat16."""
    return save_llama(tmp_path_factory.mktemp("2b"), 4)


def save_llama(folder: Path, num_layers: int) -> Path:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return folder


def table(capsys, folder: Path, *options: str) -> dict[str, list[str]]:
    """The cells of each row of what is printed: on one GPU and on eight, and both recomputed."""
    command = [
        *("task=plan", "model=blank_model", f"model.name_or_path={folder}", "loss=dpo"),
        *("plan.num_gpus=8", "plan.memory_gib=80", "max_length=2048"),
    ]
    assert run([*command, *options]) == 0
    lines = (line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines())
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines if cells}


def test_one_of_several_ranks_prints_the_table(capsys, tiny, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert table(capsys, tiny) == {}


def test_the_table_is_of_a_model_that_is_not_here(llama, capsys):
    rows = table(capsys, llama)
    assert rows["masters"][:2] == ["29.92", "3.74"]
    assert rows["most tokens at once"][0] == "do not fit" != rows["most tokens at once"][1]


def test_a_base_is_whole_or_sharded_as_in_a_run(short, capsys):
    rows = table(capsys, short, "adapter=lora")
    # 5.2 M numbers of adapters, beside less than half of 80 GiB
    assert (rows["adapters"][1], rows["base"][:2]) == ("0.02", ["3.58", "3.58"])
    # 21 MB of gradients, added up and handed out, whatever the number of micro-batches
    assert rows["sent in a step"] == ["0.00", "0.03"] * 2
    one, eight, *_ = table(capsys, short, "adapter=lora", "adapter.base=sharded")["base"]
    # beside the shards what is gathered: all outside of the blocks, and two of these
    gathered = 2 * (2 * 128_256 * 4096 + 4096 + 2 * 218_112_000) / GIB
    assert (one, float(eight)) == ("3.58", pytest.approx(3.58 / 8 + gathered, abs=0.02))
    [_, small, *_] = table(capsys, short, "adapter=lora", "plan.memory_gib=7")["base"]
    assert small == eight
    rows = table(capsys, short, "adapter=qlora", "plan.memory_gib=8")
    # four bits and an 8-bit scale for every 64 of a block's weights; embedding and head in 16
    four_bits = 4 * 218_103_808 * (0.5 + 1 / 64) + 2 * 2 * 128_256 * 4096
    assert float(rows["base"][0]) == pytest.approx(four_bits / GIB, abs=0.01)
    assert rows["base"][0] == rows["base"][1]


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({"kind": "lora"}, [True, True, False]),
        ({"kind": "lora", "base": "sharded"}, [False] * 3),
        ({"kind": "lora", "base": "replicated"}, [True] * 3),
        ({"kind": "qlora"}, [True] * 3),
    ],
)
def test_half_of_a_device_at_most_is_a_base_that_is_whole(options, whole):
    adapter = AdapterConfig(**options)
    assert [is_replicated(adapter, num_bytes=x, room=80) for x in (1, 40, 41)] == whole


def test_what_is_planned_for_need_not_be_here(tiny, capsys, monkeypatch):
    found = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None):
        return None if name in ("bitsandbytes", "flash_attn") else found(name, package)

    for room in ("adapter", "groups"):
        monkeypatch.setattr(f"fastpref.config.{room}.find_spec", find_spec)
    quantized, flash = "adapter=qlora", "model.attention=flash_attention_2"
    rows = table(capsys, tiny, quantized, flash)
    assert rows["most tokens at once"][0] != "do not fit"
    for option, package in ((quantized, "bitsandbytes"), (flash, "flash_attn")):
        command = ["model=blank_model", f"model.name_or_path={tiny}", "loss=dpo", option]
        for task in ("train", "audit"):
            assert run([*command, f"task={task}"]) == 2
            assert f"needs the package {package}" in capsys.readouterr().err


def test_rows_are_laid_out_as_they_were_asked_for(short, capsys):
    shared = table(capsys, short, "adapter=lora")["MiB a token"]
    apart = table(capsys, short, "adapter=lora", "packing.share_prompt=false")["MiB a token"]
    padded = table(capsys, short, "adapter=lora", "packing.enabled=false")["MiB a token"]
    # rotations by position: of each token of a packed row, once for all padded ones
    rotations = 2 * 128 * 2 / 2**20
    assert float(shared[0]) > float(apart[0])
    assert float(apart[0]) - float(padded[0]) == pytest.approx(rotations, abs=0.0006)


def test_no_more_is_computed_at_once_than_was_asked_for_and_a_step_has(short, capsys):
    lora = ("adapter=lora", "adapter.base=sharded", "batch_size=8", "plan.memory_gib=16")
    # of 8 pairs of 2 x 2,048 tokens each of eight GPUs has one
    whole = table(capsys, short, *lora)
    one, eight, recomputed, _ = whole["tokens taken at once"]
    assert one != "32,768" == recomputed and eight == "4,096"
    rows = table(capsys, short, *lora, "packing.max_tokens=1024")
    assert rows["tokens taken at once"] == ["1,024"] * 4
    assert float(rows["peak"][0]) < float(whole["peak"][0])


def test_a_row_above_the_limit_counts_whole_in_the_peak(short, capsys):
    # rows are pairs of 2 x 2,048 tokens
    options = ("adapter=lora", "batch_size=8")
    below, whole, above = (
        float(table(capsys, short, *options, f"packing.max_tokens={limit}")["peak"][0])
        for limit in (16, 4096, 8192)
    )
    assert below == whole < above


def test_weights_are_sent_for_each_micro_batch_and_gradients_of_adapters_once(short, capsys):
    lora = ("adapter=lora", "adapter.base=sharded", "batch_size=32")
    limits = (16_384, 4096, 1024)
    at_once, each, divided = (
        float(table(capsys, short, *lora, f"packing.max_tokens={limit}")["sent in a step"][1])
        for limit in limits
    )
    assert each == pytest.approx(4 * (at_once - 0.03) + 0.03, abs=0.05)
    # four pairs, of which none is divided
    assert divided == each


def test_a_family_that_takes_padded_rows_is_planned_for_in_such_rows(tmp_path, capsys):
    config = AutoConfig.for_model("bloom", hidden_size=64, n_layer=2, n_head=4, vocab_size=500)
    config.save_pretrained(tmp_path)
    packed, padded = (
        table(capsys, tmp_path, f"packing.enabled={enabled}")["MiB a token"]
        for enabled in (True, False)
    )
    # scores of every head and pair of tokens, kept more than once in 16 bits
    assert packed == padded and float(padded[0]) > 2 * 2 * 4 * 2048 * 2 / 2**20


def test_a_model_that_is_nowhere_is_named(tmp_path, capsys):
    command = ["task=plan", "model=blank_model", f"model.name_or_path={tmp_path}/none", "loss=dpo"]
    assert run(command) == 4
    assert "no folder" in capsys.readouterr().err


def test_a_row_that_max_length_allows_and_memory_does_not_is_told_of(tiny, capsys):
    command = ["task=plan", "model=blank_model", f"model.name_or_path={tiny}", "loss=dpo"]
    # 1 GiB of them is the head's
    assert run([*command, "plan.memory_gib=1.04", "max_length=2048"]) == 0
    # the other column, which recomputes, holds 6,000 tokens
    said = [line for line in capsys.readouterr().err.splitlines() if "beside the reserve" in line]
    assert [line.split(" tokens")[0] for line in said] == ["1 GPU: a row may have 4,096"]
    assert run([*command, "plan.memory_gib=1.04", "max_length=512"]) == 0
    assert "beside the reserve" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("optimizer=Adafactor",), "optimizer=Adafactor looks at whole matrices, which 8 ranks"),
        (("plan.memory_gib=1e308",), "plan.memory_gib must be <= 1000000, got 1e+308"),
    ],
)
def test_what_such_gpus_cannot_do_is_refused(tiny, capsys, options, error):
    command = ["task=plan", "model=blank_model", f"model.name_or_path={tiny}", "loss=dpo"]
    assert run([*command, "plan.num_gpus=8", *options]) == 2
    assert error in capsys.readouterr().err
