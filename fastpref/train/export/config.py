"""The config of an export: its source's, with the class and the dtypes of what was written."""

import json
from pathlib import Path
from typing import Any

import torch

from fastpref.model.files.families import is_wrapper
from fastpref.model.files.paths import CONFIG


def write_config(
    model: Any,
    folder: Path,
    *,
    architectures: list[str] | None,
    dtype: torch.dtype,
    others: torch.dtype | None,
) -> None:
    """Write `config.json`.

    Args:
        model: Of transformers.
        folder: To write to.
        architectures: Those of the source's config; a wrapper keeps them, of any other model it is
            the class that was trained.
        dtype: Of most of the model's own weights.
        others: Of most weights that were copied from the source; None: nothing was.
    """
    own = [type(model).__name__.removeprefix("FSDP")]
    # not a string yet in a config that was read
    model.config.dtype = dtype_name(dtype)
    model.config.architectures = (is_wrapper(model.config) and architectures) or own
    model.config.save_pretrained(folder)
    fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_bytes(json_bytes(_in_dtypes(fields, model.config, dtype, others)))


def _in_dtypes(fields: Any, config: Any, dtype: torch.dtype, others: torch.dtype | None) -> Any:
    """The fields of a config, those of its parts as well, with the dtypes of the weights.

    Args:
        fields: Saved.
        config: That was saved, or None for a part of which no more is known.
        dtype: Of the model, of its text part and what is in that.
        others: Of all other parts; None: the same.
    """
    if not isinstance(fields, dict):
        return fields
    is_text = config is None or config.get_text_config() is config
    changed = {}
    for name, value in fields.items():
        part = getattr(config, name, None) if not is_text else None
        is_other = part is not None and part is not config.get_text_config()
        changed[name] = _in_dtypes(value, None, (is_other and others) or dtype, others)
    for name in ("dtype", "torch_dtype"):
        if isinstance(changed.get(name), str):
            changed[name] = dtype_name(dtype)
    return changed


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def json_bytes(fields: Any) -> bytes:
    """A JSON file's content."""
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
