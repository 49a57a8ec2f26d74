"""Code beside a model runs where that is allowed, and is refused with its name elsewhere."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stopped_runs import run
from tiny_models import save_dataset, save_tiny_model
from transformers import AutoModelForCausalLM, initialization

from fastpref.config import ModelConfig
from fastpref.model.files import families
from fastpref.model.files.configs import load_base_config, say_what_runs
from fastpref.model.files.families import code_options
from fastpref.model.files.identity import model_identity
from fastpref.model.files.paths import find_model
from fastpref.model.source import build_meta

MARK = "print('this code ran')\n"
CONFIGURATION = """
from transformers import LlamaConfig

class MineConfig(LlamaConfig):
    model_type = "mine"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_mine import MineConfig

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast

class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "configuration_mine.MineConfig",
    "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
}


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    """Data, and a model of a family of its own."""
    # where transformers puts code that it runs, within this process fixed long ago
    for module in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    # and what it has imported of another test's
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    say_what_runs.cache_clear()
    save_dataset(tmp_path, "words", num_train=8, num_test=4)
    folder = save_tiny_model(tmp_path / "mine")
    change(folder / "config.json", model_type="mine", auto_map=AUTO_MAP)
    (folder / "configuration_mine.py").write_text(MARK + CONFIGURATION)
    (folder / "modeling_mine.py").write_text(MARK + MODELING)
    return tmp_path


def arguments(base: Path, model: Path, run_dir: Path, *options: str) -> list[str]:
    return [
        *("model=blank_model", f"model.name_or_path={model}", "model.fsdp_policy_mp=null"),
        *("datasets=[words]", f"base_data_dir={base}", f"run_dir={run_dir}", "max_length=64"),
        *("max_prompt_length=32", "batch_size=4", "loss=dpo", "sample_during_eval=false"),
        *("n_eval_examples=0", *options),
    ]


def test_code_is_refused_with_its_name_and_how_to_allow_it(base, capsys):
    assert run(arguments(base, base / "mine", base / "run")) == 4
    said = capsys.readouterr()
    assert "this code ran" not in said.out
    message = said.err.splitlines()[-1]
    assert "configuration_mine.py, modeling_mine.py" in message
    assert "model.trust_remote_code=true" in message and "read it first" in message
    assert not (base / "run").exists()


def test_allowed_it_trains_and_the_export_is_of_that_code_too(base, capsys):
    allow = "model.trust_remote_code=true"
    assert run(arguments(base, base / "mine", base / "run", allow)) == 0
    said = capsys.readouterr()
    assert "this code ran" in said.out
    assert said.err.count("running configuration_mine.py, modeling_mine.py of") == 1
    latest = base / "run" / "LATEST"
    fields = json.loads((latest / "config.json").read_text())
    assert fields["auto_map"] == AUTO_MAP and fields["architectures"] == ["MineForCausalLM"]
    weights, source = (load_file(f / "model.safetensors") for f in (latest, base / "mine"))
    assert weights.keys() == source.keys()
    assert any(not torch.equal(weights[name], source[name]) for name in source)
    loaded = AutoModelForCausalLM.from_pretrained(latest, trust_remote_code=True)
    assert type(loaded).__name__ == "MineForCausalLM"
    # a stage after it goes on from there
    assert run(arguments(base, latest, base / "next", "model.archive=" + str(latest), allow)) == 0
    assert run(arguments(base, base / "mine", base / "lora", "adapter=lora", allow)) == 0


@pytest.mark.skipif(
    not hasattr(initialization, "meta_device_safe_creation_ops"),
    reason="this transformers cannot load such a model either",
)
def test_code_that_reads_numbers_while_it_is_built_can_be_built_without_memory(base):
    reads = "    def __init__(self, config):\n        super().__init__(config)\n"
    reads += "        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]\n"
    (base / "mine" / "modeling_mine.py").write_text(f"import torch\n{MODELING}{reads}")
    source = find_model(str(base / "mine"), trust_remote_code=True)
    model = build_meta(source, dtype=torch.float32)
    assert model.rates == [0, 0.5, 1]
    assert model.lm_head.weight.is_meta


def test_a_tokenizer_of_its_own_is_code_as_well(base, tmp_path, capsys, caplog):
    folder = save_tiny_model(tmp_path / "plain")
    (folder / "tokenization_mine.py").write_text(MARK + TOKENIZATION)
    auto_map = {"AutoTokenizer": [None, "tokenization_mine.MineTokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="MineTokenizer", auto_map=auto_map)
    assert run(arguments(base, folder, base / "run")) == 4
    said = capsys.readouterr()
    assert "this code ran" not in said.out and "tokenization_mine.py" in said.err.splitlines()[-1]
    with caplog.at_level(logging.WARNING, logger="fastpref"):
        assert run(arguments(base, folder, base / "run", "model.trust_remote_code=true")) == 0
    assert "this code ran" in capsys.readouterr().out
    assert (base / "run" / "LATEST" / "tokenization_mine.py").is_file()


def test_other_code_is_another_model_where_it_runs(base):
    def identities() -> tuple[str, str]:
        first = ModelConfig(name_or_path=str(base / "mine"))
        return model_identity(first), model_identity(
            ModelConfig(name_or_path=str(base / "mine"), trust_remote_code=True)
        )

    before = identities()
    with (base / "mine" / "modeling_mine.py").open("a") as file:
        file.write("\nX = 1\n")
    after = identities()
    assert before[0] == after[0] and before[1] != after[1]


def test_code_is_that_of_the_weights_revision(base, monkeypatch):
    source = find_model(str(base / "mine"), trust_remote_code=True)._replace(revision="abc")
    config = load_base_config(source._replace(revision=None))
    assert code_options(config, source) == {"trust_remote_code": True, "code_revision": "abc"}
    # of another repository it has revisions of its own
    config.auto_map = {name: f"else/where--{code}" for name, code in AUTO_MAP.items()}
    assert code_options(config, source) == {"trust_remote_code": True}
    asked = []
    monkeypatch.setattr(families, "is_wrapper", lambda config: True)
    monkeypatch.setattr(families, "text_part", lambda family: family)
    monkeypatch.setattr(
        families,
        "get_class_from_dynamic_module",
        lambda code, name, revision: asked.append(revision),
    )
    families.find_family(config, source)
    assert asked == ["abc"]
