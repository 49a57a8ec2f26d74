"""LATEST: the trained model as a Hugging Face folder, with what its source has beside the weights.

In which dtype: `model.save_dtype` is null by default, and the weights are written as they were
trained, in the master dtype. Rounding float32 weights to a checkpoint's bfloat16 would drop most of
what a small learning rate adds: near 0.02 bfloat16 numbers are 1.2e-4 apart, and a weight that a
run moved by less than half of that would be the old one again. A stage that goes on from LATEST
(DPO after SFT, token weights from two models) would lose that without a sign. For a folder that is
served rather than trained on, `checkpoint` halves it and the log says that it was rounded; a run
that computes in bfloat16 rounds its weights just so in its own forward passes.
"""

import copy
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import GenerationConfig

from fastpref.complete_files import complete_folder
from fastpref.distributed import World
from fastpref.errors import CheckpointError
from fastpref.model.adapters import SAFETENSORS
from fastpref.model.lora import Adapters, adapter_state
from fastpref.model.merged import load_merged
from fastpref.model.paths import CONFIG, EXPORT_FOLDER, MERGED_FOLDER
from fastpref.model.reading import reason
from fastpref.model.scorer import TokenScorer
from fastpref.train.export_plan import GENERATION_CONFIG, ExportPlan, json_bytes

logger = logging.getLogger("fastpref")


def export_model(scorer: TokenScorer, plan: ExportPlan | None, run_dir: Path, world: World) -> Path:
    """Write `<run_dir>/LATEST`: safetensors, config, tokenizer and what else the source has.

    Of adapters it is a peft folder, which names its base; the model that they are merged into goes
    to `LATEST-merged`, if that was asked for.

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
    folder = run_dir / EXPORT_FOLDER
    gathered: dict[str, Any] = {}
    if scorer.adapters is None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered = get_model_state_dict(scorer, options=options)

    def write() -> None:
        assert plan is not None
        if scorer.adapters is None:
            weights = {name.removeprefix("model."): x for name, x in gathered.items()}
            _write_model(scorer.model, weights, plan, folder)
            return
        _write_adapters(scorer.model, scorer.adapters, plan, folder)
        if plan.adapter is not None and plan.adapter.merge:
            model = _merge(folder, plan, world)
            _write_model(model, model.state_dict(), plan, run_dir / MERGED_FOLDER)
        elif (run_dir / MERGED_FOLDER).is_dir():
            logger.info("deleted %s: it was of an earlier adapter", run_dir / MERGED_FOLDER)
            shutil.rmtree(run_dir / MERGED_FOLDER)

    # the others wait until the model is there
    world.on_main(write)
    return folder


def _merge(folder: Path, plan: ExportPlan, world: World) -> Any:
    assert plan.adapter is not None
    try:
        return load_merged(str(folder), plan.model, plan.adapter, world.device)
    except CheckpointError as error:
        raise CheckpointError(
            f"adapter.merge=true: {error}; the adapter itself is written"
        ) from error


def _write_adapters(model: Any, adapters: Adapters, plan: ExportPlan, folder: Path) -> None:
    assert plan.base is not None
    with _new_folder(folder) as partial:
        partial.mkdir()
        weights = {name: x.cpu().contiguous() for name, x in adapter_state(model).items()}
        # as peft writes it
        save_file(weights, partial / SAFETENSORS, metadata={"format": "pt"})
        config = copy.copy(adapters.config)
        config.base_model_name_or_path = plan.base.name
        config.revision = plan.base.source.revision
        config.inference_mode = True
        config.save_pretrained(partial)
        _write_files(plan.texts, partial)
    logger.info(
        "wrote %s: the adapter of %s, in %s",
        folder,
        plan.base.name,
        _dtype_name(_dtype_of_most(weights)),
    )


def _write_model(model: Any, weights: dict[str, Tensor], plan: ExportPlan, folder: Path) -> None:
    """Write a folder with all of a model.

    Args:
        model: For its class, config and names.
        weights: By its names; a tied one is written once, as transformers ties it on loading.
        plan: What stands beside them.
        folder: Of the model.
    """
    first_names = dict(model.named_parameters()).keys()
    every_name = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    weights = {name: x for name, x in weights.items() if name not in every_name - first_names}
    trained = _dtype_of_most(weights)
    for name in list(weights):
        weights[name] = weights[name].to(plan.dtype_of(name, weights[name]))
    written = _dtype_of_most(weights)
    with _new_folder(folder) as partial:
        own = model.generation_config
        # one that breaks a rule of transformers is not saved; the source's own file is copied below
        model.generation_config = GenerationConfig()
        try:
            model.save_pretrained(partial, state_dict=weights)
        finally:
            model.generation_config = own
        (partial / GENERATION_CONFIG).unlink(missing_ok=True)
        config = json.loads((partial / CONFIG).read_text(encoding="utf-8"))
        (partial / CONFIG).write_bytes(json_bytes(_in_dtype(config, written)))
        _write_files(plan.others, partial)
        _write_files(plan.texts, partial)
    logger.info("wrote %s %s", folder, _in_words(trained, written, plan))


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    with complete_folder(folder) as partial:
        try:
            yield partial
        # of safetensors, with the system's reason in its text
        except SafetensorError as error:
            raise OSError(reason(error)) from error


def _write_files(files: Mapping[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _in_words(trained: torch.dtype, written: torch.dtype, plan: ExportPlan) -> str:
    """ "in bfloat16, …": the dtype of an export, and what else it could have been."""
    words = f"in {_dtype_name(written)}"
    loaded = plan.loaded.commonest
    if written != trained:
        return (
            f"{words} (model.save_dtype={plan.model.save_dtype}), trained in {_dtype_name(trained)}"
        )
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
