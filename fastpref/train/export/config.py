"""The config of an export: its source's, with the class and the dtypes of what was written."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastpref.model.files.families import is_wrapper
from fastpref.model.files.paths import CONFIG


def write_config(
    model: Any,
    folder: Path,
    *,
    source: Mapping[str, Any],
    dtype: torch.dtype,
    others: torch.dtype | None,
) -> None:
    """Write `config.json`.

    Args:
        model: Of transformers.
        folder: To write to.
        source: Fields of the source's config. A wrapper keeps its architectures, of any other model
            it is the class that was trained.
        dtype: Of most of the model's own weights.
        others: Of most weights that were copied from the source; None: nothing was.
    """
    own = [type(model).__name__.removeprefix("FSDP")]
    # not a string yet in a config that was read
    model.config.dtype = dtype_name(dtype)
    model.config.architectures = (is_wrapper(model.config) and source.get("architectures")) or own
    model.config.save_pretrained(folder)
    fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    kind = type(model.config)
    fields, more = (
        _in_dtypes(x, model.config, dtype, others)
        for x in (fields, _with_older_names(fields, source, kind))
    )
    (folder / CONFIG).write_bytes(json_bytes(more if _reads_alike(kind, fields, more) else fields))


def _with_older_names(
    fields: dict[str, Any], source: Mapping[str, Any], kind: Any
) -> dict[str, Any]:
    """The fields of a config, and those of its source that transformers writes under newer names.

    Whatever reads the older names alone takes a default where they are gone, without a word:
    transformers 4 rotates by a rope_theta of 10,000.

    Args:
        fields: Saved.
        source: Those that the model came with.
        kind: Class of the config.
    """
    # those of its files and of a library's state are no longer true
    gone = {
        name: value
        for name, value in source.items()
        if name not in fields and name != "quantization_config" and not name.startswith("_")
    }
    joined = fields | gone
    for name, part in getattr(kind, "sub_configs", {}).items():
        if isinstance(fields.get(name), dict) and isinstance(source.get(name), dict):
            joined[name] = _with_older_names(fields[name], source[name], part)
    return joined


def _reads_alike(kind: Any, fields: dict[str, Any], more: dict[str, Any]) -> bool:
    """Whether a kind of config reads from fields with others among them what it reads from them
    alone."""
    try:
        # it changes what it reads
        alone, both = (kind.from_dict(copy.deepcopy(x)).to_dict() for x in (fields, more))
    # of a family's own code, which may take one of two names alone
    except Exception:
        return False
    return _has_all(both, alone)


def _has_all(found: Any, expected: Any) -> bool:
    """Whether a value has all that another one has, which may have more fields."""
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return bool(found == expected)
    return all(name in found and _has_all(found[name], value) for name, value in expected.items())


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
