"""Where models and tokenizers come from: folders, runs, seed-format archives, the hub."""

import json
import logging
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastpref.checks import hint
from fastpref.errors import CheckpointError, ConfigError, first_line

logger = logging.getLogger("fastpref")

EMBEDDED = "tiny"
"""The name of the model that ships with the package."""

EXPORT_FOLDER = "LATEST"
"""The folder of a run that holds the trained model in Hugging Face form."""


ADAPTER_CONFIG = "adapter_config.json"
"""What makes a folder a LoRA adapter of peft: its weights are merged into those of its base."""


def resolve_model(name_or_path: str, *, key: str = "model.name_or_path") -> str:
    """The folder (or hub name) that a model option means.

    Accepts the embedded model's name, a Hugging Face folder, a peft adapter folder, a run folder
    (its `LATEST/` is taken), `…/LATEST/policy.pt` of a run that wrote a folder instead, and hub
    names.

    Args:
        name_or_path: What the user wrote.
        key: The option it was written under, for the message.

    Raises:
        CheckpointError: it looks like a path and nothing usable lies there.
    """
    if name_or_path == EMBEDDED and not Path(name_or_path).exists():
        return str(files("fastpref") / "assets" / EMBEDDED)
    path = Path(name_or_path).expanduser()
    if path.name == "policy.pt" and not path.exists():
        path = path.parent
    # the TIS-DPO README downloads to models/NAME and trains from models/ORGANISATION/NAME
    shorter = path.parent.parent / path.name
    for folder in (path, path / EXPORT_FOLDER, shorter):
        if (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file():
            if folder is shorter:
                logger.warning("%s: no folder %s, taking %s", key, path, folder)
            return str(folder)
    if path.is_dir():
        raise CheckpointError(
            f"{key}: {path} holds no model; expected config.json and weights in it or in its "
            f"{EXPORT_FOLDER}/, found {sorted(child.name for child in path.iterdir())[:8]}"
        )
    if _looks_like_a_path(name_or_path):
        raise CheckpointError(f"{key}: no folder {path}{_nearest_neighbour(path)}")
    return name_or_path


def _looks_like_a_path(name: str) -> bool:
    # a hub name is NAME or ORGANISATION/NAME; a folder beside us named like the first part is ours
    starts_like_one = name.startswith(("/", ".", "~")) or name.count("/") > 1
    return starts_like_one or ("/" in name and Path(name).parent.is_dir())


def _nearest_neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    return hint(path.name, [child.name for child in path.parent.iterdir() if child.is_dir()])


def load_model(
    name: str,
    *,
    dtype: torch.dtype,
    attention: str = "auto",
    revision: str | None = None,
    archive: str | None = None,
) -> Any:
    """A causal LM with weights, on the CPU.

    Args:
        name: What `resolve_model` returned.
        dtype: The dtype the weights are stored in.
        attention: eager or sdpa; any other leaves the choice to transformers, because
            FlashAttention computes on a GPU alone and the model is checked on the CPU.
        revision: Hub revision.
        archive: Weights to load instead of the model's own: a Hugging Face folder, a run folder
            or a seed-format `policy.pt`.

    Raises:
        CheckpointError: it cannot be found, or its weights do not fill the model.
    """
    weights = _archive_weights(archive) if archive else None
    base = adapter_base(name)
    if base is not None:
        model = load_model(base, dtype=dtype, attention=attention)
        merged = merge_adapter(model, name)
        if weights is not None:
            _fill(merged, weights, archive)
        return merged
    options = _attention_option(attention)
    model = _load_complete(name, revision=revision, dtype=dtype, **options)
    if weights is not None:
        _fill(model, weights, archive)
    return model


def _load_complete(name: str, **options: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained`, but weights that are missing are an error: it would
    draw them at random."""
    model, info = _from_hub(AutoModelForCausalLM, name, output_loading_info=True, **options)
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise CheckpointError(f"{name}: weights missing or of the wrong shape: {_some(wrong)}")
    return model


def adapter_base(name: str) -> str | None:
    """The base model of a peft adapter folder, None for any other model."""
    path = Path(name) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    return resolve_model(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])


def merge_adapter(model: Any, folder: str) -> Any:
    """The model with an adapter's weights merged into its own.

    Raises:
        ConfigError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise ConfigError(f"model: {folder} is an adapter, which needs the package peft")
    from peft import PeftModel

    merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    logger.info("merged the adapter %s into its base model", folder)
    return merged


def build_empty(
    name: str, *, dtype: torch.dtype, attention: str = "auto", revision: str | None = None
) -> Any:
    """The same model without weights, its memory untouched: rank 0 sends them after sharding."""
    model = build_meta(name, dtype=dtype, attention=attention, revision=revision)
    # pages that nobody writes cost no memory, so every rank of a node can hold such a model
    model = model.to_empty(device="cpu")
    model.tie_weights()
    return model


def build_meta(
    name: str, *, dtype: torch.dtype, attention: str = "auto", revision: str | None = None
) -> Any:
    """The same model without memory: its modules, shapes and dtypes."""
    config = _from_hub(AutoConfig, adapter_base(name) or name, revision=revision)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **_attention_option(attention))


def _attention_option(attention: str) -> dict[str, str]:
    return {"attn_implementation": attention} if attention in ("eager", "sdpa") else {}


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a model.

    Raises:
        CheckpointError: there is none.
        ConfigError: it has no end-of-sequence token, so no response could ever end.
    """
    tokenizer = _from_hub(AutoTokenizer, name, revision=revision)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.tokenizer_name_or_path: the tokenizer of {name} has no end-of-sequence token; "
            "set eos_token in its tokenizer_config.json or name another tokenizer"
        )
    return tokenizer


def load_config(name: str, revision: str | None = None) -> Any:
    """A model's config.

    Raises:
        CheckpointError: there is none.
    """
    return _from_hub(AutoConfig, name, revision=revision)


def read_vocab_size(name: str, revision: str | None = None) -> int:
    """Rows of a model's embedding, read off its config without loading weights."""
    return load_config(adapter_base(name) or name, revision).get_text_config().vocab_size


def pad_token_id(tokenizer: Any, num_embeddings: int) -> int:
    """What fills a row: the tokenizer's padding token, else EOS, else token 0. Never scored or
    attended to, but looked up all the same, so it has a row in the embedding.

    Args:
        tokenizer: Its padding token may have been added to it alone.
        num_embeddings: Rows of the model's embedding.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None and token_id < num_embeddings:
            return token_id
    return 0


def _from_hub(factory: Any, name: str, **options: Any) -> Any:
    """`factory.from_pretrained` with one readable error."""
    try:
        return factory.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "out of memory" in str(error).lower():
            raise
        raise CheckpointError(
            f"model: cannot load {factory.__name__.removeprefix('Auto')} from {name}: "
            f"{first_line(error)}"
        ) from error
    # of a truncated file; it derives from Exception alone
    except SafetensorError as error:
        raise CheckpointError(f"model: the weights in {name} are damaged: {error}") from error


def _archive_weights(archive: str) -> dict[str, Tensor]:
    path = Path(archive).expanduser()
    if path.is_file():
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise CheckpointError(f"model.archive: {path} cannot be read: {error}") from error
        if not isinstance(saved, dict) or "state" not in saved:
            raise CheckpointError(
                f"model.archive: {path} is no policy archive; expected a dict with 'state'"
            )
        logger.info("model.archive: step %s of %s", saved.get("step_idx"), path)
        return saved["state"]
    folder = resolve_model(archive, key="model.archive")
    if not Path(folder).is_dir():
        raise CheckpointError(f"model.archive: no file or folder {path}{_nearest_neighbour(path)}")
    model = _load_complete(folder, dtype="auto")
    logger.info("model.archive: weights of %s", folder)
    return model.state_dict()


def _fill(model: nn.Module, weights: dict[str, Tensor], archive: str | None) -> None:
    """Copy an archive's weights into the model; buffers and the second name of a tied weight may
    be absent, nothing else."""
    own = dict(model.named_parameters())
    wrong_shape = [
        name for name in own if name in weights and weights[name].shape != own[name].shape
    ]
    missing = [name for name in own if name not in weights]
    if wrong_shape or missing:
        raise CheckpointError(
            f"model.archive: {archive} does not fit the model: "
            f"missing {_some(missing)}, wrong shape {_some(wrong_shape)}"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def _some(names: list[str]) -> str:
    return (
        ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "none"
    )
