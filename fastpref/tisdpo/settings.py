"""Everything that token weights depend on besides the two models and the tokens."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fastpref.config import PackingConfig, WeightsConfig
from fastpref.data.cache import code_digest
from fastpref.data.chat import ChatFormat
from fastpref.data.tokenizer_checks import tokenizer_digest
from fastpref.model.files.paths import named_model
from fastpref.scoring.side import Side


def scoring_settings(
    sides: Sequence[Side], chat: ChatFormat, *, weights: WeightsConfig, packing: PackingConfig
) -> dict[str, Any]:
    """Everything besides model and tokens that log-probabilities depend on; it goes into the names
    of shard folders.

    Batching and libraries are included: others round differently, and a file must have one
    rounding.
    """
    model, quantized = sides[0].model, any(side.quantized for side in sides)
    libraries = ["torch", "transformers"]
    libraries += ["peft"] * any(named_model(side.model).adapters for side in sides)
    libraries += ["bitsandbytes"] * quantized
    return {
        "tokenizer": tokenizer_digest(chat.tokenizer),
        "chat_template": chat.template,
        "template_kwargs": dict(chat.arguments),
        "chat_date": chat.date,
        "include_eos": weights.include_eos,
        "compute_dtype": model.compute_dtype,
        "stored_dtype": model.reference_dtype,
        "in_four_bits": model.block_name or "blocks" if quantized else "",
        "attention": model.attention,
        "batch_size": weights.batch_size,
        "packing": asdict(packing),
        "shard_rows": weights.shard_rows,
        "code": code_digest("data", "batches", "model", "scoring", "tisdpo", "kernels"),
        "libraries": {name: version(name) for name in libraries},
    }
