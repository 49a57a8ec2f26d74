"""LATEST: the trained model as a Hugging Face folder, with what its source has beside the weights.

In which dtype: `model.save_dtype` is null by default, and the weights are written as they were
trained, in the master dtype. Rounding float32 weights to a checkpoint's bfloat16 would drop most of
what a small learning rate adds: near 0.02 bfloat16 numbers are 1.2e-4 apart, and a weight that a
run moved by less than half of that would be the old one again. A stage that goes on from LATEST
(DPO after SFT, token weights from two models) would lose that without a sign. For a folder that is
served rather than trained on, `checkpoint` halves it and the log says that it was rounded; a run
that computes in bfloat16 rounds its weights just so in its own forward passes.
"""

import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

from fastpref.complete_files import remove, replace_folder, writing
from fastpref.config import ModelConfig
from fastpref.distributed import World
from fastpref.errors import CheckpointError
from fastpref.model.loaded_dtypes import LoadedDtypes, loaded_dtypes
from fastpref.model.paths import (
    CONFIG,
    EXPORT_FOLDER,
    TOKENIZER_FILES,
    find_model,
    local_folder,
    matching_files,
)
from fastpref.model.reading import reading, reason
from fastpref.model.scorer import TokenScorer
from fastpref.model.source import find_tokenizer

logger = logging.getLogger("fastpref")

GENERATION_CONFIG = "generation_config.json"
MODEL_FILES = (
    *(GENERATION_CONFIG, "*processor*.json", "audio_tokenizer_config.json", "chat_template.json"),
    *("*.py", "LICENSE*", "NOTICE*"),
)
"""Patterns of what a model's folder holds beside weights, config and tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """What LATEST will hold, known before training starts.

    What cannot be saved is found out before it costs a trained model, and a source that changes or
    goes away meanwhile changes nothing.
    """

    files: Mapping[str, bytes]
    """Everything beside weights and config, by its path in the folder."""
    save_dtype: str | None
    """The option."""
    loaded: LoadedDtypes
    """Of the checkpoint that the run started from."""

    def dtype_of(self, name: str, weight: Tensor) -> torch.dtype:
        """What a weight is written in."""
        if self.save_dtype is None or not weight.is_floating_point():
            return weight.dtype
        if self.save_dtype == "float32":
            return torch.float32
        return self.loaded.by_name.get(name, self.loaded.commonest) or weight.dtype


def plan_export(
    model: ModelConfig, model_config: Any, tokenizer: Any, chat_template: str | None
) -> ExportPlan:
    """Gather what LATEST holds beside the trained weights.

    Args:
        model: The run's options.
        model_config: Of transformers, of the loaded model.
        tokenizer: That of the run.
        chat_template: Jinja text that replaced the tokenizer's own, None if none did.

    Raises:
        CheckpointError: transformers cannot save config or tokenizer or load what was saved, or a
            file cannot be read.
    """
    if type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        # the text part of some models that see, which transformers loads with the rest alone
        raise CheckpointError(
            f"model: what is trained of {model.name_or_path}, {model_config.model_type}, is no "
            f"causal language model by itself, so nothing could load {EXPORT_FOLDER}"
        )
    source = find_model(model.name_or_path, model.revision)
    files = _read_files(source.base, source.revision, MODEL_FILES)
    for adapter in source.adapters:
        files |= _read_files(adapter, None, MODEL_FILES)
    files |= _read_files(*find_tokenizer(model), TOKENIZER_FILES)
    with tempfile.TemporaryDirectory() as folder, reading("a config to save", source.base):
        model_config.save_pretrained(folder)
    with reading("a tokenizer to save", tokenizer.name_or_path):
        files |= _save_tokenizer(tokenizer, chat_template)
    if chat_template is not None:
        files = {name: _with_template(data, name, chat_template) for name, data in files.items()}
    return ExportPlan(files=files, save_dtype=model.save_dtype, loaded=loaded_dtypes(model))


def _read_files(name: str, revision: str | None, patterns: tuple[str, ...]) -> dict[str, bytes]:
    with reading("the files", name):
        folder = local_folder(name, revision, patterns)
        return {path.name: path.read_bytes() for path in matching_files(folder, patterns)}


def _save_tokenizer(tokenizer: Any, chat_template: str | None) -> dict[str, bytes]:
    own_template = tokenizer.chat_template
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            if chat_template is not None:
                tokenizer.chat_template = chat_template
            tokenizer.save_pretrained(folder)
        finally:
            tokenizer.chat_template = own_template
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _with_template(data: bytes, name: str, chat_template: str) -> bytes:
    """A JSON file with its chat template replaced, as processors have one of their own."""
    fields = json.loads(data) if name.endswith(".json") else None
    if not isinstance(fields, dict) or "chat_template" not in fields:
        return data
    return _json_bytes(fields | {"chat_template": chat_template})


def _json_bytes(fields: Any) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def export_model(scorer: TokenScorer, plan: ExportPlan | None, run_dir: Path, world: World) -> Path:
    """Write `<run_dir>/LATEST`: safetensors, config, tokenizer and what else the source has.

    Every rank calls this; rank 0 gathers the weights on the CPU and writes. The folder appears
    under its name only when it is complete.

    Args:
        scorer: The trained model.
        plan: What stands beside its weights; None on every rank but 0.
        run_dir: Of the run.
        world: Whoever has a part of the weights.

    Returns:
        The folder, which `AutoModelForCausalLM.from_pretrained` loads.

    Raises:
        CheckpointError: it cannot be written.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(scorer, options=options)
    folder = run_dir / EXPORT_FOLDER

    def write() -> None:
        assert plan is not None
        weights = _named_weights(scorer, gathered)
        partial = run_dir / f"{EXPORT_FOLDER}.partial"
        with writing(folder):
            try:
                remove(partial)
                dtype = _write(scorer.model, weights, plan, partial)
                replace_folder(partial, folder)
            # of safetensors, with the system's reason in its text
            except SafetensorError as error:
                raise OSError(reason(error)) from error
            finally:
                # half a model is of no use, and takes the space that is wanting
                shutil.rmtree(partial, ignore_errors=True)
        logger.info("wrote %s %s", folder, dtype)

    # the others wait until the model is there
    world.on_main(write)
    return folder


def _named_weights(scorer: TokenScorer, gathered: dict[str, Any]) -> dict[str, Tensor]:
    """Weights by the model's names; a tied one once, as transformers ties it again on loading."""
    every_name = {name for name, _ in scorer.named_parameters(remove_duplicate=False)}
    second_names = every_name - {name for name, _ in scorer.named_parameters()}
    return {
        name.removeprefix("model."): weight
        for name, weight in gathered.items()
        if name not in second_names
    }


def _write(model: Any, weights: dict[str, Tensor], plan: ExportPlan, folder: Path) -> str:
    """Write a folder; returns in which dtype, in words."""
    trained = _dtype_of_most(weights)
    for name in list(weights):
        weights[name] = weights[name].to(plan.dtype_of(name, weights[name]))
    written = _dtype_of_most(weights)
    own = model.generation_config
    # one that breaks a rule of transformers is not saved; the source's own file is copied below
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        model.generation_config = own
    (folder / GENERATION_CONFIG).unlink(missing_ok=True)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_bytes(_json_bytes(_in_dtype(config, written)))
    for name, data in plan.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return _in_words(trained, written, plan)


def _in_words(trained: torch.dtype, written: torch.dtype, plan: ExportPlan) -> str:
    """ "in bfloat16, …": the dtype of an export, and what else it could have been."""
    words = f"in {_dtype_name(written)}"
    loaded = plan.loaded.commonest
    if written != trained:
        return f"{words} (model.save_dtype={plan.save_dtype}), trained in {_dtype_name(trained)}"
    if loaded is None or loaded == written:
        return words
    return f"{words}, as trained; model.save_dtype=checkpoint writes {_dtype_name(loaded)}"


def _dtype_of_most(weights: Mapping[str, Tensor]) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for weight in weights.values():
        sizes[weight.dtype] += weight.numel() if weight.is_floating_point() else 0
    return sizes.most_common(1)[0][0]


def _in_dtype(config: Any, dtype: torch.dtype) -> Any:
    """The fields of a config, those of its parts as well, with the dtype of the weights."""
    if not isinstance(config, dict):
        return config
    fields = {name: _in_dtype(value, dtype) for name, value in config.items()}
    for name in ("dtype", "torch_dtype"):
        if isinstance(fields.get(name), str):
            fields[name] = _dtype_name(dtype)
    return fields


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
