"""`task=audit`: what training would say of the data."""

from fastpref.config import ModelConfig
from fastpref.data.audit import run_audit
from fastpref.data.options import DataOptions
from fastpref.data.source import SPLITS, check_sources, log_layouts, read_rows
from fastpref.model.paths import named_model
from fastpref.model.source import load_model_tokenizer, read_vocab_size


def audit(options: DataOptions, model: ModelConfig) -> None:
    """Read, check and encode every split; no model's weights are loaded."""
    check_sources(options)
    log_layouts([rows for split in SPLITS for rows in read_rows(options, split, quiet=False)])
    vocab_size = read_vocab_size(named_model(model))
    run_audit(options, load_model_tokenizer(model), vocab_size=vocab_size)
