"""Runs that train adapters: beside plain peft and torch, stopped and resumed, on two ranks too."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from ranks import run_on_ranks
from safetensors.torch import load_file
from stopped_runs import assert_same_end, run, run_in_starts
from tiny_models import read_metrics, save_dataset, save_tiny_model, write_rows
from torch.distributed.checkpoint import FileSystemReader
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from fastpref.config import Config
from fastpref.model.adapters.quantize import round_blocks
from fastpref.model.source import load_tokenizer

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "gpt-neox": {"model_type": "gpt_neox"},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 3.0},
}
LOSSES = {
    "dpo": ["loss=dpo"],
    "tdpo1": ["loss=tdpo", "loss.if_tdpo2=false"],
    "tdpo2": ["loss=tdpo"],
    "tisdpo": ["loss=tisdpo", "transform=paper"],
}
NUM_ROWS = 8
BETA = 0.5


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("lora")
    save_dataset(base, "words", num_train=NUM_ROWS)
    for name, config in FAMILIES.items():
        save_tiny_model(base / name, **config)
        save_adapter(base / name, base / f"{name}-adapter")
    return base


def save_adapter(model: Path, folder: Path, **config: Any) -> None:
    """An adapter that somebody trained."""
    torch.manual_seed(1)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        peft.LoraConfig(task_type="CAUSAL_LM", **(options | config)),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)


def arguments(base: Path, model: str, run_dir: Path, *options: str) -> list[str]:
    return [
        *("model=blank_model", f"model.name_or_path={base / model}", "model.fsdp_policy_mp=null"),
        *("datasets=[words]", f"base_data_dir={base}", f"run_dir={run_dir}", "max_length=200"),
        *("max_prompt_length=100", f"batch_size={NUM_ROWS}", "n_epochs=2", "n_eval_examples=0"),
        *("adapter=lora", "optimizer=SGD", "lr=1", "warmup_steps=0", "max_grad_norm=1e9"),
        *("minimum_log_interval_secs=0", "data.drop_last=false", f"loss.beta={BETA}", *options),
    ]


def response_logp(model: Any, tokenizer: Any, prompt: str, response: str) -> Any:
    """log π(response, EOS | prompt), in nats, from a model's own logits."""
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    response_ids = tokenizer(response, add_special_tokens=False).input_ids
    ids = torch.tensor([[*prompt_ids, *response_ids, tokenizer.eos_token_id]])
    logps = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
    return logps.gather(1, ids[0, len(prompt_ids) :, None]).sum()


def plain_steps(base: Path, start: Path, num_steps: int, losses: list[float]) -> dict[str, Any]:
    """The same steps as plain peft and torch take them, one sequence at a time.

    Returns:
        The adapter's weights after them.
    """
    config = peft.PeftConfig.from_pretrained(start)
    tokenizer = load_tokenizer(config.base_model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path).eval()
    policy = peft.PeftModel.from_pretrained(model, start, is_trainable=True).eval()
    reference = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path), start
    ).eval()
    if not config.ensure_weight_tying:
        # which would be two matrices then
        policy, reference = policy.double(), reference.double()
    trained = [p for p in policy.parameters() if p.requires_grad]
    rows = [json.loads(line) for line in (base / "words/train.jsonl").read_text().splitlines()]

    for _ in range(num_steps):
        loss = 0.0
        for row in rows:
            margin = 0.0
            for response, sign in ((row["chosen"], 1), (row["rejected"], -1)):
                ours = response_logp(policy, tokenizer, row["prompt"], response)
                with torch.no_grad():
                    theirs = response_logp(reference, tokenizer, row["prompt"], response)
                margin = margin + sign * (ours - theirs)
            loss = loss - logsigmoid(BETA * margin) / len(rows)
        losses.append(loss.item())
        for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            parameter.data -= gradient
    return peft.get_peft_model_state_dict(policy, save_embedding_layers=False)


TABLES = {
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied": (
        "qwen2",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "dora": ("llama", {"use_dora": True}),
    "rank stabilized": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}}),
}


@pytest.mark.parametrize("case", list(TABLES))
def test_adapters_of_other_forms_are_trained_as_plain_peft_trains_them(base, tmp_path, case):
    family, config = TABLES[case]
    save_adapter(base / family, tmp_path / "start", **config)
    command = arguments(base, str(tmp_path / "start"), tmp_path / family, "loss=dpo")
    assert run(command) == 0
    assert_same_as_plain(base, tmp_path, family, start=tmp_path / "start")


def assert_same_as_plain(base: Path, out: Path, family: str, start: Path | None = None) -> None:
    losses: list[float] = []
    folder = base / f"{family}-adapter" if start is None else start
    expected = plain_steps(base, folder, 2, losses)
    before = load_file(folder / "adapter_model.safetensors")
    trained = load_file(out / family / "LATEST" / "adapter_model.safetensors")
    assert trained.keys() == expected.keys()
    largest = max((expected[name] - before[name]).abs().max().item() for name in expected)
    # where policy and reference are one, it is not small
    assert largest > 1e-3
    for name, weight in expected.items():
        error = (trained[name] - weight).abs().max().item()
        assert error <= 1e-6 * max(1, 5 * largest), name
    for record, loss in zip(read_metrics(out / family, "train"), losses, strict=True):
        assert record["loss/train"] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("family", "options"),
    [*((family, []) for family in FAMILIES), ("gemma2", ["packing.enabled=false"])],
)
def test_steps_are_those_of_plain_peft(base, tmp_path, family, options):
    command = arguments(base, f"{family}-adapter", tmp_path / family, "loss=dpo", *options)
    assert run(command) == 0
    assert_same_as_plain(base, tmp_path, family)


WAYS = {
    "replicated": ["adapter.base=replicated"],
    "sharded": ["adapter.base=sharded", "activation_checkpointing=true"],
    "padded": ["packing.enabled=false", "activation_checkpointing=true"],
}
ON_TWO_RANKS = [
    *((way, "llama") for way in ("replicated", "padded")),
    *(("sharded", family) for family in FAMILIES if family != "llama"),
]


def train_on_two_ranks(base: Path, out: Path) -> None:
    for way, family in ON_TWO_RANKS:
        options = ("loss=dpo", *WAYS[way])
        assert run(arguments(base, f"{family}-adapter", out / way / family, *options)) == 0


def test_two_ranks_take_the_steps_of_plain_peft(base, tmp_path):
    run_on_ranks(train_on_two_ranks, 2, base, tmp_path)
    for way, family in ON_TWO_RANKS:
        assert_same_as_plain(base, tmp_path / way, family)


def test_blocks_computed_again_in_the_backward_give_the_same_bits(base, tmp_path):
    options = {"kept": [], "again": ["activation_checkpointing=true"]}
    for name, option in options.items():
        command = arguments(base, "llama-adapter", tmp_path / name, "loss=dpo", *option)
        assert run([*command, "adapter.dropout=0.2"]) == 0
    assert_same_file(tmp_path / "again", tmp_path / "kept")


@pytest.mark.parametrize(
    ("family", "loss"),
    [
        *((family, "dpo") for family in FAMILIES),
        *(("llama", loss) for loss in LOSSES if loss != "dpo"),
        ("gemma2", "tdpo2"),
    ],
)
def test_the_first_loss_is_exactly_the_logarithm_of_two(base, tmp_path, family, loss):
    if loss == "tisdpo":
        tokenizer = load_tokenizer(str(base / family))
        lines = (base / "words/train.jsonl").read_text().splitlines()
        rows = [weighted(json.loads(line), tokenizer) for line in lines]
        write_rows(tmp_path / "weighted", "train", rows)
        data = ["datasets=[weighted]", f"base_data_dir={tmp_path}"]
    else:
        data = []
    command = arguments(base, family, tmp_path / "run", *LOSSES[loss], *data, "n_epochs=1")
    assert run(command) == 0
    [record] = read_metrics(tmp_path / "run", "train")
    assert record["loss/train"] == float(torch.tensor(2.0).log())
    assert record["grad_norm"] > 0


def weighted(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A row with weights of another size for every token."""
    weights = {
        side: len(tokenizer(row[side], add_special_tokens=False).input_ids)
        for side in ("chosen", "rejected")
    }
    return row | {
        f"{side}_weight": [0.1 * i - 1 for i in range(length)] for side, length in weights.items()
    }


@pytest.mark.parametrize("loss", ["sft", "simpo"])
def test_losses_without_a_reference_train_a_given_adapter_on(base, tmp_path, loss, capsys):
    command = arguments(base, "llama-adapter", tmp_path / "run", f"loss={loss}", "lr=0.1")
    assert run([option for option in command if not option.startswith("loss.beta")]) == 0
    first, *_, last = (record["loss/train"] for record in read_metrics(tmp_path / "run", "train"))
    assert last < first
    assert "cannot be planned" not in capsys.readouterr().err


def test_a_tied_adapter_is_trained_on_with_the_options_that_made_it(base, tmp_path):
    tied = ["adapter.target_modules=[q_proj,lm_head]", "adapter.ensure_weight_tying=true"]
    # a transpose of one row lies in the memory of what it is of
    tied.append("adapter.r=1")
    command = arguments(base, "qwen2", tmp_path / "first", "loss=dpo", *tied)
    assert run(command) == 0
    model = f"model.name_or_path={tmp_path / 'first'}"
    again = arguments(base, "qwen2", tmp_path / "second", "loss=dpo", *tied)
    assert run([*again, model]) == 0
    [record, *_] = read_metrics(tmp_path / "second", "train")
    assert record["loss/train"] == float(torch.tensor(2.0).log())


STEPS = ["n_epochs=6", "batch_size=4", "optimizer=AdamW", "lr=1e-3", "adapter.r=4"]


NEW_AND_SHARDED = {"new": ["adapter.dropout=0.1"], "sharded": ["adapter.base=sharded"]}


def stopped_and_whole(base: Path, out: Path, jobs: dict[str, list[str]]) -> None:
    for name, options in jobs.items():
        command = [*arguments(base, "llama", out / name / "whole", "loss=dpo", *STEPS), *options]
        assert run(command) == 0
        command = [*arguments(base, "llama", out / name / "cut", "loss=dpo", *STEPS), *options]
        assert run_in_starts(command, 5)[-1] == 0


def test_stopped_and_resumed_a_run_ends_bitwise_the_same(base, tmp_path):
    # one rank shards nothing
    stopped_and_whole(base, tmp_path, {"new": NEW_AND_SHARDED["new"]})
    run_on_ranks(stopped_and_whole, 2, base, tmp_path / "ranks", NEW_AND_SHARDED)
    for folder in (tmp_path / "new", *(tmp_path / "ranks" / name for name in NEW_AND_SHARDED)):
        assert_same_end(
            folder / "cut",
            folder / "whole",
            files=["LATEST/adapter_model.safetensors", "LATEST/adapter_config.json"],
        )
    # of adapters and what trains them, and nothing of the model
    [newest] = (tmp_path / "new" / "whole" / "checkpoints").glob("step-00000012")
    saved = FileSystemReader(newest).read_metadata().state_dict_metadata
    assert saved and all("lora_" in name and ".default" in name for name in saved)


IDS = torch.arange(3, 40)[None]


def mean_logp(base: Path, model: Any) -> float:
    """Of the held-out chosen responses, in nats."""
    tokenizer = load_tokenizer(model.name_or_path)
    lines = (base / "words/test.jsonl").read_text().splitlines()
    return sum(
        response_logp(model, tokenizer, row["prompt"], row["chosen"]).item()
        for row in map(json.loads, lines)
    ) / len(lines)


EXPORTS = [
    *((family, "", []) for family in FAMILIES),
    ("llama", "-adapter", []),
    (
        # which has nothing that is tied
        "llama",
        "",
        [
            "adapter.target_modules=[q_proj,lm_head,embed_tokens]",
            "adapter.ensure_weight_tying=true",
        ],
    ),
    (
        "qwen2",
        "",
        ["adapter.target_modules=[q_proj,lm_head]", "adapter.ensure_weight_tying=true"],
    ),
]


@pytest.mark.parametrize(("family", "start", "options"), EXPORTS)
def test_an_export_is_what_was_trained_for_peft_transformers_and_merged(
    base, tmp_path, family, start, options
):
    command = arguments(base, family + start, tmp_path / "run", "loss=dpo", "adapter.merge=true")
    # held-out numbers at the end are those of the adapter that is exported
    options = [*options, "n_eval_examples=10", "eval_batch_size=10", "sample_during_eval=false"]
    assert run([*command, *options]) == 0
    latest, merged = tmp_path / "run" / "LATEST", tmp_path / "run" / "LATEST-merged"
    fields = json.loads((latest / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(base / family)
    assert fields["target_modules"] == sorted(fields["target_modules"])
    assert not (latest / "config.json").exists()
    with torch.no_grad():
        bare = AutoModelForCausalLM.from_pretrained(base / family)(IDS).logits
        adapted = peft.AutoPeftModelForCausalLM.from_pretrained(latest)(IDS).logits
        taken = AutoModelForCausalLM.from_pretrained(latest)(IDS).logits
        alone = AutoModelForCausalLM.from_pretrained(merged)
        torch.testing.assert_close(taken, adapted)
        # a product with a sum of weights beside a sum of products
        torch.testing.assert_close(alone(IDS).logits, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - bare).abs().max() > 1e-2
    chosen = read_metrics(tmp_path / "run", "eval")[-1]["logps_eval/chosen"]
    assert mean_logp(base, alone) == pytest.approx(chosen, rel=1e-4)
    assert load_tokenizer(str(latest)).get_vocab() == load_tokenizer(str(merged)).get_vocab()
    # all of the model, and nothing of peft's names
    assert load_file(merged / "model.safetensors").keys() == (
        load_file(base / family / "model.safetensors").keys()
    )


def test_training_goes_on_from_an_adapter_that_was_trained_here(base, tmp_path):
    """Two runs of one epoch, the second one on the first one's adapter: its reference is that
    adapter, so its first loss is ln 2 again, where the same adapter against the bare model is
    not."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(arguments(base, "llama", first, "loss=dpo")) == 0
    assert run([*arguments(base, "llama", second, "loss=dpo"), f"model.name_or_path={first}"]) == 0
    records = [read_metrics(folder, "train") for folder in (first, second)]
    log_two = float(torch.tensor(2.0).log())
    assert records[0][0]["loss/train"] == records[1][0]["loss/train"] == log_two
    assert records[0][1]["loss/train"] < log_two - 1e-4
    config = json.loads((second / "LATEST" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base / "llama")
    archive = [*arguments(base, "llama", tmp_path / "third", "loss=dpo")]
    assert run([*archive, f"model.archive={first}"]) == 0
    assert_same_file(tmp_path / "third", second)


def assert_same_file(ours: Path, expected: Path) -> None:
    name = "LATEST/adapter_model.safetensors"
    assert (ours / name).read_bytes() == (expected / name).read_bytes()


def train_in_bfloat16(base: Path, out: Path, kinds: list[str]) -> None:
    for kind in kinds:
        command = arguments(base, "llama", out / kind, "loss=dpo", f"adapter.base={kind}")
        assert run([*command, "model.fsdp_policy_mp=bfloat16", "lr=1e-6"]) == 0


@pytest.mark.parametrize("named_by", ["model.name_or_path", "model.archive"])
def test_all_weights_are_trained_on_from_a_base_with_its_adapter(base, tmp_path, named_by):
    adapter = base / "llama-adapter"
    merged = tmp_path / "merged"
    plain = AutoModelForCausalLM.from_pretrained(base / "llama")
    peft.PeftModel.from_pretrained(plain, adapter).merge_and_unload().save_pretrained(merged)
    source_tokenizer = load_tokenizer(base / "llama")
    source_tokenizer.save_pretrained(merged)
    whole = ("adapter=none", "loss=tdpo")
    ends = []
    for name, option in [("one", f"{named_by}={adapter}"), ("two", f"model.name_or_path={merged}")]:
        folder = tmp_path / name
        assert run(arguments(base, "llama", folder, *whole, option)) == 0
        ends.append(load_file(folder / "LATEST" / "model.safetensors"))
    before = load_file(merged / "model.safetensors")
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(weight, before[name]), name


def test_adapters_are_trained_in_float32_beside_a_model_in_bfloat16(base, tmp_path):
    """A step of 1e-6 times a gradient is lost in 16 bits, beside weights of 1e-1."""
    train_in_bfloat16(base, tmp_path, ["auto"])
    run_on_ranks(train_in_bfloat16, 2, base, tmp_path, ["replicated", "sharded"])
    for kind in ("auto", "replicated", "sharded"):
        weights = load_file(tmp_path / kind / "LATEST" / "adapter_model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        moved = [weight for name, weight in weights.items() if "lora_B" in name]
        assert all(0 < weight.abs().max() < 1e-6 for weight in moved)
        assert not any(torch.equal(x, x.bfloat16().float()) for x in moved)


def test_dropout_of_adapters_is_drawn_in_training_alone_and_said_to_move_the_first_loss(
    base, tmp_path
):
    for name in ("one", "two"):
        command = arguments(base, "llama-adapter", tmp_path / name, "loss=dpo", "n_epochs=1")
        command += ["n_eval_examples=8", "eval_every=8", "sample_during_eval=false"]
        assert run([*command, "adapter.dropout=0.5"]) == 0
    [record] = read_metrics(tmp_path / "one", "train")
    before = read_metrics(tmp_path / "one", "eval")[0]
    log_two = float(torch.tensor(2.0).log())
    assert record["loss/train"] != pytest.approx(log_two, abs=1e-5)
    assert before["loss/eval"] == log_two
    assert_same_file(tmp_path / "one", tmp_path / "two")


def train_quantized(base: Path, run_dir: Path) -> None:
    """As on a GPU; the package's path for CPUs computes the same in its own time."""
    Config.check_device = lambda *_: None
    for family in ("llama", "gemma2"):
        model = str(run_dir / f"{family}-base")
        command = arguments(base, model, run_dir / family, "adapter=qlora", "loss=tdpo")
        assert run([*command, "adapter.merge=true", "n_epochs=1"]) == 0


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_beside_layers_in_four_bits_adapters_are_trained_and_merged(
    base, tmp_path, num_ranks, monkeypatch
):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(Config, "check_device", Config.check_device)
    for family in ("llama", "gemma2"):
        # columns in blocks of 64, as the path for CPUs asks for
        config = FAMILIES[family] | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
        save_tiny_model(tmp_path / f"{family}-base", **config)
    if num_ranks == 1:
        train_quantized(base, tmp_path)
    else:
        run_on_ranks(train_quantized, num_ranks, base, tmp_path)
    for family in ("llama", "gemma2"):
        [record] = read_metrics(tmp_path / family, "train")
        assert record["loss/train"] == float(torch.tensor(2.0).log())
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}-base")
        round_blocks(model, None, torch.device("cpu"))
        trained = peft.PeftModel.from_pretrained(model, tmp_path / family / "LATEST")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / family / "LATEST-merged")
        with torch.no_grad():
            torch.testing.assert_close(
                merged(IDS).logits, trained(IDS).logits, rtol=1e-5, atol=1e-5
            )
            bare = AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}-base")
            assert (bare(IDS).logits - merged(IDS).logits).abs().max() > 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("loss", ["dpo", "tdpo1", "tdpo2"])
@pytest.mark.parametrize("adapter", ["none", "lora", "qlora"])
def test_on_a_gpu_a_run_starts_at_log_two_and_learns(base, tmp_path, adapter, loss):
    """In bfloat16, with whatever attention and layers are there."""
    if adapter == "qlora":
        pytest.importorskip("bitsandbytes")
    config = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    save_tiny_model(tmp_path / "model", **config)
    command = arguments(base, str(tmp_path / "model"), tmp_path / "run", *LOSSES[loss])
    command += [f"adapter={adapter}", "model.fsdp_policy_mp=bfloat16", "optimizer=AdamW", "lr=1e-3"]
    assert run([*command, "n_epochs=6"]) == 0
    records = read_metrics(tmp_path / "run", "train")
    assert records[0]["loss/train"] == pytest.approx(float(torch.tensor(2.0).log()), abs=1e-6)
    assert records[-1]["loss/train"] < records[0]["loss/train"]
