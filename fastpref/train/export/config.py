"""`config.json` of an export: the source's, with the class and dtypes of the written weights."""

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
        model: The transformers model that was trained.
        folder: Where to write.
        source: Fields of the source's config. The `architectures` of a multimodal wrapper are kept;
            of any other model they become the trained class.
        dtype: The most common dtype of the model's own weights.
        others: The most common dtype of weights copied from the source; None: none were.
    """
    own = [type(model).__name__.removeprefix("FSDP")]
    # set as a string: a config that was loaded has a torch.dtype here
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
    """The fields of a config, plus older names that the source has and transformers has renamed.

    A reader that knows only the older names would silently take a default for a missing one:
    transformers 4 would use a rope_theta of 10,000.

    Args:
        fields: The fields as saved by this version of transformers.
        source: The fields in the source's config.
        kind: Class of the config.
    """
    # private fields and those of a quantized checkpoint do not describe what was written
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
    """Whether a config class reads the same values from `fields` and from `more`, a superset."""
    try:
        # copies: from_dict changes its argument
        alone, both = (kind.from_dict(copy.deepcopy(x)).to_dict() for x in (fields, more))
    # raised by a model family's own code, which may refuse two names for one value
    except Exception:
        return False
    return _has_all(both, alone)


def _has_all(found: Any, expected: Any) -> bool:
    """Whether `found` equals `expected`, or for dicts contains it, recursively."""
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return bool(found == expected)
    return all(name in found and _has_all(found[name], value) for name, value in expected.items())


def _in_dtypes(fields: Any, config: Any, dtype: torch.dtype, others: torch.dtype | None) -> Any:
    """The fields of a config and its sub-configs, with `dtype` set to that of the weights.

    Args:
        fields: The saved fields.
        config: The config that they were saved from; None below its top level.
        dtype: Dtype of the model, its text part and everything in it.
        others: Dtype of all other parts; None: the same.
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
    """The content of a JSON file, indented, in UTF-8."""
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
