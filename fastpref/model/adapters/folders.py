"""Adapter folders of peft: how they change the shape of their base, and merging them into it."""

import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastpref.errors import CheckpointError, is_shortage
from fastpref.model.adapters.tied_head import is_tied, shared_table
from fastpref.model.files.archives import load_pickle
from fastpref.model.files.families import other_parts
from fastpref.model.files.paths import ADAPTER_CONFIG, read_object
from fastpref.model.files.reading import reading

logger = logging.getLogger("fastpref")

SAFETENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
"""Prefix that peft adds to the names of its base's modules."""
IN_MEMORY = re.compile(r"(\.modules_to_save|(\.lora_\w+))\.default(?=\.|$)")
"""The parts of a name in peft's layers, and not in its folders: the adapter's own name."""


def check_adapter(folder: str) -> None:
    """Refuse, before any weights are loaded, an adapter that cannot be merged.

    Raises:
        CheckpointError: it has no weights, is of another task, or does not change weights.
    """
    from peft import PeftConfig

    path = Path(folder)
    fields = read_object(path / ADAPTER_CONFIG)
    if not any((path / name).is_file() for name in (SAFETENSORS, PICKLED)):
        raise CheckpointError(f"model: the adapter {folder} has no weights, no file {SAFETENSORS}")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        raise CheckpointError(
            f"model: the adapter {folder} is for the task {fields['task_type']}, expected CAUSAL_LM"
        )
    with reading("the adapter", folder):
        config = PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise _not_mergeable(folder, "it adds tokens to the input instead of changing weights")
    if getattr(config, "layer_replication", None):
        layers = f"layer_replication={config.layer_replication}"
        raise _not_mergeable(folder, f"it has {layers}, so it is of a model of other layers")


def adapt_config(config: Any, model: Any, folder: str) -> bool:
    """Adapt a base's config to the vocabulary size and weight tying that an adapter implies.

    Args:
        config: Of the base; changed in place.
        model: Built from it; may be on the meta device.
        folder: Of the adapter.

    Returns:
        Whether anything changed.
    """
    text_config = config.get_text_config()
    before = (text_config.vocab_size, config.tie_word_embeddings)
    text_config.vocab_size = _vocabulary(folder, model)
    if _unties(folder, model):
        untie(config)
    return before != (text_config.vocab_size, config.tie_word_embeddings)


def check_merging(model: Any, folder: str) -> None:
    """Refuse an adapter that cannot be merged, by the headers of its weights.

    Args:
        model: The base on the meta device, with the adapter's vocabulary; modified.
        folder: Of the adapter.

    Raises:
        CheckpointError: they do not fit the base, or peft cannot merge them.
    """
    from peft import LoraConfig, PeftConfig, PeftModel

    with reading("the adapter", folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PeftConfig.from_pretrained(folder)
        # other kinds may need the values of their base's weights
        if type(config) is not LoraConfig or any(
            getattr(config, name, None) for name in ("kasa_config", "arrow_config")
        ):
            return
        # the values come from the folder
        config.init_lora_weights = True
        adapted = PeftModel(model, config, low_cpu_mem_usage=True)
    if not config.ensure_weight_tying and (shared := shared_table(model, "default")):
        raise _not_mergeable(folder, shared)
    _fill(adapted, folder, load_headers(folder))
    _merge(adapted, folder)


@torch.no_grad()
def merge_adapter(model: Any, folder: str) -> Any:
    """Merge an adapter's weights into a model.

    The result is compared with the unmerged adapter on a few tokens: merging what cannot be merged,
    such as an adapter on an embedding that is tied to the head, would silently give another model.

    Args:
        model: The base, in float32; not to be used any more.
        folder: Of the adapter.

    Raises:
        CheckpointError: it does not fit the base, or computes something else when merged.
    """
    from peft import PeftConfig, PeftModel

    saved = load_adapter(folder)
    rows, unties = _vocabulary(folder, model), _unties(folder, model)
    if rows != model.get_input_embeddings().weight.shape[0]:
        # the adapter brings the new rows
        model.resize_token_embeddings(rows, mean_resizing=False)
    with reading("the adapter", folder), warnings.catch_warnings():
        # peft asks for an attribute by a name that transformers has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = True
        adapted = PeftModel(model, config).eval()
    _fill(adapted, folder, saved)
    ids = torch.arange(4)[None] % rows
    with reading("the adapter", folder):
        expected = adapted(input_ids=ids).logits
        merged = _merge(adapted, folder)
    if unties:
        untie(merged.config)
    # peft copies modules that it saves whole, which unties them
    merged.tie_weights()
    logits = merged(input_ids=ids).logits
    if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3):
        difference = (logits - expected).abs().max().item()
        raise _not_mergeable(folder, f"merged, its logits are off by {difference:.2g}")
    logger.info("merged the adapter %s into its base model", folder)
    # peft froze the base
    return merged.requires_grad_(True)


def load_adapter(folder: str) -> dict[str, Tensor]:
    """All tensors of an adapter folder, by the names that peft gives them in its folders.

    Raises:
        CheckpointError: it cannot be read, or a number in it is not finite.
    """
    path = Path(folder) / SAFETENSORS
    with reading("the adapter", folder):
        saved = load_file(path) if path.is_file() else _pickled(folder)
    for name, tensor in saved.items():
        # 8-bit floats have no isfinite
        values = tensor.float() if tensor.element_size() == 1 else tensor
        if not torch.isfinite(values).all():
            raise CheckpointError(
                f"model: the adapter {folder} is not finite: NaN or infinity in {name} of "
                f"{path.name if path.is_file() else PICKLED}"
            )
    return _by_folder_name(saved, folder)


def _folder_name(name: str) -> str:
    """The name that peft's folders have for a tensor; a state dict of the model with its adapter
    has the adapter's name in it, one of a model without peft's wrapper lacks the prefix."""
    return PREFIX + IN_MEMORY.sub(r"\2", name).removeprefix(PREFIX)


def _by_folder_name(saved: dict[str, Any], folder: str) -> dict[str, Any]:
    """Tensors by `_folder_name`.

    Raises:
        CheckpointError: two have the same.
    """
    named: dict[str, Any] = {}
    for key, tensor in saved.items():
        name = _folder_name(key)
        if name in named:
            raise CheckpointError(f"model: the adapter {folder} has {name} under two names")
        named[name] = tensor
    return named


def _merge(adapted: Any, folder: str) -> Any:
    _forget_tied_head(adapted)
    try:
        return adapted.merge_and_unload()
    # each kind of adapter raises another error if it cannot be merged
    except Exception as error:
        if is_shortage(error):
            raise
        raise _not_mergeable(folder, str(error).strip()) from error


def _forget_tied_head(adapted: Any) -> None:
    """Remove a head's adapter that is a view of the embedding's: merged, it would count twice."""
    model = adapted.base_model.model
    head = model.get_output_embeddings()
    looks = adapted.peft_config["default"].to_dict().get("ensure_weight_tying") and is_tied(model)
    if looks and hasattr(head, "base_layer"):
        model.set_output_embeddings(head.base_layer)


def _not_mergeable(folder: str, why: str) -> CheckpointError:
    fields = read_object(Path(folder) / ADAPTER_CONFIG)
    return CheckpointError(
        f"model: the adapter {folder} ({fields.get('peft_type')}) cannot be merged into its base "
        f"model: {why}"
    )


def _fill(adapted: Any, folder: str, saved: dict[str, Tensor]) -> None:
    """Load an adapter's tensors; missing ones, which peft leaves random, and ones that the base has
    no place for are refused."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    # peft reports which names it took: folders of older versions of transformers have others than
    # the model (one matrix per expert instead of a stack)
    with reading("the adapter", folder):
        result: Any = set_peft_model_state_dict(adapted, saved)
    needed = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    missing = sorted({name.replace(".default", "") for name in result.missing_keys} & needed)
    own = {name for name, _ in adapted.base_model.model.named_parameters(remove_duplicate=False)}
    spare = sorted(name for name in result.unexpected_keys if not _has_place(name, own))
    if missing or spare:
        raise no_fit(folder, missing, spare, adapted.base_model.model)


def no_fit(
    folder: str, missing: Sequence[str], spare: Sequence[str], model: Any
) -> CheckpointError:
    """The error for an adapter that does not fit its base.

    Args:
        folder: Of the adapter.
        missing, spare: Names of weights that it lacks, and that the base has no place for.
        model: The base.
    """
    parts = [part for part in other_parts(model) if any(f"{part}." in name for name in spare)]
    if parts:
        return CheckpointError(
            f"model: the adapter {folder} is in {', '.join(parts)} too, which rows of text do not "
            f"go through and which is not loaded; name the model that it is merged into"
        )
    return CheckpointError(
        f"model: the adapter {folder} does not fit its base model: missing "
        f"{', '.join(missing[:4]) or 'none'}, without a place {', '.join(spare[:4]) or 'none'}"
    )


def _has_place(name: str, own: set[str]) -> bool:
    """Whether a saved name belongs to a module of the base, or to peft's copy of one."""
    module = name.removeprefix(PREFIX)
    for part in (".modules_to_save", ".original_module", ".base_layer", ".token_adapter"):
        module = module.replace(part, "")
    stem = module.rpartition(".")[0]
    return any(path.startswith(f"{stem}.") for path in own)


def load_headers(folder: str) -> dict[str, Tensor]:
    """The tensors of an adapter folder on the meta device, by the names of `load_adapter`.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = Path(folder) / SAFETENSORS
    with reading("the adapter", folder):
        if path.is_file():
            with safe_open(path, "pt") as file:
                names = file.keys()
                shapes = {name: file.get_slice(name).get_shape() for name in names}
            headers = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        else:
            headers = {name: tensor.to("meta") for name, tensor in _pickled(folder).items()}
    return _by_folder_name(headers, folder)


def _pickled(folder: str) -> dict[str, Tensor]:
    return load_pickle(Path(folder) / PICKLED)


def _table_paths(model: Any) -> list[str]:
    """Names of a model's embedding and head as peft writes them."""
    modules = dict(model.named_modules())
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return [f"{PREFIX}{name}." for table in tables for name, m in modules.items() if m is table]


def _vocabulary(folder: str, model: Any) -> int:
    """Number of rows of the embedding that an adapter belongs to: the base's, or that of a resized
    embedding, which peft saves with the adapter."""
    tables = tuple(_table_paths(model))
    for name, tensor in load_headers(folder).items():
        if not name.startswith(tables):
            continue
        if name.endswith("lora_embedding_A"):
            return tensor.shape[1]
        if name.endswith(".weight") and not name.endswith("lora_A.weight"):
            return tensor.shape[0]
    return model.get_input_embeddings().weight.shape[0]


def _unties(folder: str, model: Any) -> bool:
    """Whether an adapter has an embedding or a head of its own, so that they have to be untied."""
    saved = load_headers(folder)
    copies = []
    for path in _table_paths(model):
        names = (f"{path}modules_to_save.weight", f"{path}weight")
        copies += [name for name in names if name in saved][:1]
    if len(copies) == 2:
        # peft saves both if the embedding was resized, and equal ones if they were tied
        return not torch.equal(*(_tensor(folder, name) for name in copies))
    return bool(copies) and is_tied(model)


def untie(config: Any) -> None:
    """Mark embedding and head as untied in a config."""
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


def _tensor(folder: str, name: str) -> Tensor:
    path = Path(folder) / SAFETENSORS
    if not path.is_file():
        return _by_folder_name(_pickled(folder), folder)[name]
    with safe_open(path, "pt") as file:
        names = file.keys()
        [key] = [key for key in names if _folder_name(key) == name]
        return file.get_tensor(key)
