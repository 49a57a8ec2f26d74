"""LATEST: the trained model as a Hugging Face folder, with all other files of its source.

The dtype: `model.save_dtype` is null by default, and weights are written in the master dtype that
they were trained in. Rounding float32 weights to a checkpoint's bfloat16 would discard most of what
a small learning rate adds: near 0.02 bfloat16 numbers are 1.2e-4 apart, and a weight that training
moved by less than half of that would get its old value back. A stage that starts from LATEST (DPO
after SFT, token weights from two models) would silently lose it. For a model that is served rather
than trained further, `checkpoint` halves its size, and the log says that it was rounded; a run that
computes in bfloat16 rounds its weights in the same way in its own forward passes.
"""

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from fastpref.distributed import World
from fastpref.errors import CheckpointError
from fastpref.model.adapters.folders import SAFETENSORS
from fastpref.model.adapters.lora import Adapters, adapter_state
from fastpref.model.files.paths import EXPORT_FOLDER, MERGED_FOLDER
from fastpref.model.merged import load_merged
from fastpref.model.scorer import TokenScorer
from fastpref.train.export.config import dtype_name
from fastpref.train.export.model_folder import dtype_of_most, new_folder, write_files, write_model
from fastpref.train.export.plan import ExportPlan
from fastpref.train.export.weight_files import write_safetensors

logger = logging.getLogger("fastpref")


def export_model(scorer: TokenScorer, plan: ExportPlan | None, run_dir: Path, world: World) -> Path:
    """Write `<run_dir>/LATEST`: safetensors, config, tokenizer and all other files of the source.

    Adapters are written as a peft folder that names its base model; the merged model, if requested,
    goes to `LATEST-merged`.

    Every rank calls this; rank 0 gathers the weights on the CPU and writes. The folder gets its
    name only when it is complete.

    Args:
        scorer: The trained model.
        plan: The files and dtypes to write; None on every rank but 0.
        run_dir: The run folder.
        world: The ranks, which may hold shards of the weights.

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
            write_model(scorer.model, weights, plan, folder)
            return
        _write_adapters(scorer.model, scorer.adapters, plan, folder)
        if plan.adapter is not None and plan.adapter.merge:
            model = _merge(folder, plan, world)
            write_model(model, model.state_dict(), plan, run_dir / MERGED_FOLDER)
        elif (run_dir / MERGED_FOLDER).is_dir():
            logger.info("deleted %s: it was of an earlier adapter", run_dir / MERGED_FOLDER)
            shutil.rmtree(run_dir / MERGED_FOLDER)

    # on_main: the other ranks wait until the model is written
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
    with new_folder(folder) as partial:
        partial.mkdir()
        weights = {name: x.cpu() for name, x in adapter_state(model).items()}
        # the file name and format that peft uses
        write_safetensors(weights, partial / SAFETENSORS)
        config = copy.copy(adapters.config)
        config.base_model_name_or_path = plan.base.name
        config.revision = plan.base.source.revision
        config.inference_mode = True
        for name, value in vars(config).items():
            if isinstance(value, set):
                # sets of names, which peft would write in a different order each time
                setattr(config, name, sorted(value))
        config.save_pretrained(partial)
        write_files(plan.texts, partial)
    logger.info(
        "wrote %s: the adapter of %s, in %s",
        folder,
        plan.base.name,
        dtype_name(dtype_of_most(weights)),
    )
