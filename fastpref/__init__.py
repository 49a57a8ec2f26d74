"""Preference learning on Hugging Face causal language models: SFT, DPO, TDPO, TIS-DPO."""

__version__ = "0.1.0"
