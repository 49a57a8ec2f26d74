"""`task=audit`: what training would say of the data."""

from fastpref.config import ModelConfig
from fastpref.data.announce import read_splits
from fastpref.data.audit import run_audit
from fastpref.data.options import DataOptions
from fastpref.data.source import SPLITS
from fastpref.model.source import load_vocabulary


def audit(options: DataOptions, model: ModelConfig) -> None:
    """Read, check and encode every split; no model's weights are loaded."""
    read_splits(options, SPLITS, quiet=False)
    tokenizer, vocab_size = load_vocabulary(model)
    run_audit(options, tokenizer, vocab_size=vocab_size)
