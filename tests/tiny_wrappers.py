"""Tiny wrappers on disk: a language model, a tower that text does not go through, heads for several
tokens that transformers does not load."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import build_family
from torch import Tensor
from transformers import AutoTokenizer

from fastpref.model.files.paths import resolve_model

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from tiny_families import build_tiny

KINDS = ("gemma3", "qwen2_5_vl", "qwen3_vl", "mistral3", "llava", "llama4", "qwen3_5")
BESIDE = {
    "preprocessor_config.json": '{"size": 3}',
    "processor_config.json": '{"processor_class": "X"}',
    "generation_config.json": '{"eos_token_id": [2, 7]}',
}
_AROUND = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
_WITHIN = (("model.language_model.", "model."), ("model.visual.", "visual."))
OLD_NAMES = {
    "gemma3": _AROUND,
    "mistral3": _AROUND,
    "llava": _AROUND,
    "qwen2_5_vl": _WITHIN,
}
"""What names began with in checkpoints of transformers before 4.52."""
MTP = {
    "mtp.layers.0.proj.weight": torch.arange(12.0).view(3, 4).to(torch.bfloat16),
    "mtp.norm.weight": torch.ones(4),
}


def save_wrapper(
    folder: Path, kind: str, *, old_names: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A random wrapper as a folder of the hub has it; returns what its file holds."""
    model = build_tiny(kind)
    names = OLD_NAMES[kind] if old_names else ()
    first = dict(model.named_parameters()).keys()
    weights = {
        _renamed(name, names): x.to(dtype).contiguous()
        for name, x in model.state_dict().items()
        if name in first
    }
    return write_checkpoint(folder, model.config, weights | MTP)


def save_with_mtp(folder: Path) -> dict[str, Tensor]:
    """A plain causal LM with a layer behind its last one, for the token after the next."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = build_family("llama", vocab_size=352, num_attention_heads=4, **sizes)
    own = model.state_dict()
    layer = {
        name.replace("layers.1.", "layers.2."): x + 1
        for name, x in own.items()
        if "layers.1." in name
    }
    return write_checkpoint(folder, model.config, own | layer | MTP)


def write_checkpoint(folder: Path, config: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A folder with config, weights, the embedded model's tokenizer and what else there may be."""
    AutoTokenizer.from_pretrained(resolve_model("tiny")).save_pretrained(folder)
    config.save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"architectures": ["AsItWas"]}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    return weights


def _renamed(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    for new, old in prefixes:
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name
