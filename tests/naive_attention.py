"""Variable-length attention in plain torch, as its kernels are called."""

import torch

from fastpref.model.attention.backends import PackedAttention, attend_varlen


def naive_varlen(q, k, v, layout, rules, *, aligned_at_end=True):
    """What variable-length kernels compute, one segment after another."""
    cu_q, cu_k = layout.query_offsets, layout.key_offsets
    assert layout.longest == cu_q.diff().max() and layout.longest_keys == cu_k.diff().max()
    outputs = []
    for i in range(len(cu_q) - 1):
        queries = q[cu_q[i] : cu_q[i + 1]].transpose(0, 1)
        keys, values = (x[cu_k[i] : cu_k[i + 1]].transpose(0, 1) for x in (k, v))
        R, K = queries.shape[1], keys.shape[1]
        end = K - R if aligned_at_end else 0
        mask = torch.ones(R, K, dtype=torch.bool).tril(end)
        mask = mask if rules.window is None else mask.triu(end - rules.window + 1)
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (keys, values))
        scores, softcap = queries @ keys.mT * rules.scale, rules.softcap
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        probabilities = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        outputs.append((probabilities @ values).transpose(0, 1))
    return torch.cat(outputs)


VARLEN = PackedAttention(name="naive varlen", attend=attend_varlen(naive_varlen))
