"""Which models are refused by what their config says, each in one sentence."""

import json

import pytest
import torch
from tiny_models import save_tiny_model
from transformers import BartConfig, BertConfig, T5Config, ViTConfig

from fastpref.errors import CheckpointError
from fastpref.model.files.configs import load_config
from fastpref.model.files.paths import find_model
from fastpref.model.source import build_empty, load_model, read_vocab_size


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def folder(model_dir, tmp_path):
    for path in model_dir.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    return tmp_path


BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}
CUSTOM = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MyConfig"}}
FIELDS = {
    # changes of a good config: what is said
    "quantized": ({"quantization_config": BITSANDBYTES}, r"quantized \(bitsandbytes\)"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized \(gptq\)"),
    "unnamed format": ({"quantization_config": {}}, "quantized"),
    "text for a format": ({"quantization_config": "4bit"}, "cannot load Config"),
    "custom code": (
        CUSTOM,
        r"without running configuration_mine\.py: .* 'mine'.*trust_remote_code=true",
    ),
    "unknown family": ({"model_type": "nosuch"}, "nosuch"),
    "no family": ({"model_type": None}, "cannot load Config"),
    "text for a number": ({"hidden_size": "many"}, "expected int, got str"),
    "null for a number": ({"vocab_size": None}, "expected int, got NoneType"),
    "heads": ({"num_attention_heads": 7, "head_dim": None}, "not a multiple of the number of"),
    "no heads": ({"num_attention_heads": 0, "head_dim": None}, "ZeroDivisionError"),
    "dtype": ({"dtype": "float7"}, "float7"),
}
FILES = {
    "no JSON": ("{ this", "config.json cannot be read as JSON"),
    "list": ("[]", "must hold a JSON object, got list"),
    "null": ("null", "must hold a JSON object, got NoneType"),
    "empty": ("", "config.json cannot be read as JSON"),
}


def write_config(folder, model_dir, case):
    if case in FILES:
        (folder / "config.json").write_text(FILES[case][0])
        return FILES[case][1]
    fields = json.loads((model_dir / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | FIELDS[case][0]))
    return FIELDS[case][1]


@pytest.mark.parametrize("case", [*FIELDS, *FILES])
def test_a_config_that_cannot_be_used_is_one_sentence_wherever_it_is_read(
    folder, model_dir, case, monkeypatch
):
    # a question on the terminal would be answered by nobody
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    message = write_config(folder, model_dir, case)
    name = str(folder)
    for read in (
        lambda: read_vocab_size(find_model(name)),
        lambda: load_model(find_model(name), dtype=torch.float32),
        lambda: build_empty(find_model(name), dtype=torch.float32),
    ):
        with pytest.raises(CheckpointError, match=message) as raised:
            read()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "nosuch"}, {"rope_parameters": {"rope_type": "nosuch"}}]
)
def test_a_config_that_no_model_can_be_built_from_is_one_sentence(folder, model_dir, changes):
    fields = json.loads((model_dir / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | changes))
    for build in (load_model, build_empty):
        with pytest.raises(CheckpointError, match=r"cannot load (ModelForCausalLM|Config) from"):
            build(find_model(str(folder)), dtype=torch.float32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), r"is an encoder-decoder model \(t5\)"),
        (BartConfig(), r"is an encoder-decoder model \(bart\)"),
        (ViTConfig(), "is no causal language model: transformers has none of type vit"),
    ],
)
def test_models_that_are_not_causal_are_refused_by_name(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_config(str(tmp_path))
    for load in (load_model, build_empty):
        with pytest.raises(CheckpointError, match=message):
            load(find_model(str(tmp_path)), dtype=torch.float32)


def test_code_beside_a_family_that_transformers_has_is_not_run(folder, model_dir):
    fields = json.loads((model_dir / "config.json").read_text())
    fields["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.MyModel"}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "modeling_mine.py").write_text("raise SystemExit('run')")
    assert (
        type(load_model(find_model(str(folder)), dtype=torch.float32)).__name__
        == "LlamaForCausalLM"
    )


def test_a_masked_language_model_lacks_what_a_causal_one_has(tmp_path):
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no file named"):
        load_model(find_model(str(tmp_path)), dtype=torch.float32)
