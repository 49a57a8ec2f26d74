"""Fused ops for preference learning: hidden states in, token scores out, logits never built."""

from fastpref_kernels.sequence_log_ratios import sequence_log_ratios
from fastpref_kernels.tdpo1_token_values import tdpo1_token_values
from fastpref_kernels.token_logps import token_logps
from fastpref_kernels.token_logps_kl import TokenScores, token_logps_and_kl
from fastpref_kernels.workspace import get_workspace_mib, set_workspace_mib

__all__ = [
    "TokenScores",
    "get_workspace_mib",
    "sequence_log_ratios",
    "set_workspace_mib",
    "tdpo1_token_values",
    "token_logps",
    "token_logps_and_kl",
]
