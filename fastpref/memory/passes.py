"""Memory of a forward and a backward, counted on the meta device."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.batch import Batch
from fastpref.memory.live_bytes import LiveBytes
from fastpref.memory.stack import SHALLOW, Stack
from fastpref.memory.stand_ins import CountedAttention, kernels
from fastpref.model.attention.interface import packed_row
from fastpref.model.logit_path import last_hidden_states
from fastpref.model.mixers import Sequences, computing
from fastpref.model.router import states_and_router_logits


class Passes(NamedTuple):
    """Bytes kept after the forward over one batch, and peak bytes of its backward."""

    kept: float
    peak: float

    @classmethod
    def of_all_blocks(cls, stack: Stack | None, *model_and_batch: Any) -> "Passes":
        """Count a whole model; with a `stack`, extrapolate from its first blocks: each block keeps
        the same amount, and all of it is live when the backward starts."""
        if stack is None:
            return cls.of(*model_and_batch)
        shallow = []
        for num_blocks in SHALLOW:
            with stack.cut_to(num_blocks):
                shallow.append(cls.of(*model_and_batch))
        few, more = shallow
        beyond = stack.steps_beyond * (more.kept - few.kept)
        return cls(kept=more.kept + beyond, peak=more.peak + beyond)

    @classmethod
    def of(
        cls, model: Any, body: str, batch: Batch, attention: CountedAttention, router_logits: bool
    ) -> "Passes":
        inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        sequences = None
        if batch.layout is not None:
            inputs |= packed_row(batch, attention.packed)
            sequences = Sequences(batch.layout)
        present = [*model.parameters(), *model.buffers(), *inputs.values()]
        present = [x for x in present if isinstance(x, Tensor)]
        with torch.enable_grad(), kernels(), computing(sequences), LiveBytes(present) as live:
            if router_logits:
                # router logits stay alive until the load-balancing loss is computed
                hidden_BLD, _logits = states_and_router_logits(model, body, **inputs)
            else:
                hidden_BLD = last_hidden_states(model, body, **inputs)
            kept = live.live
            live.restart_peak()
            hidden_BLD.backward(torch.empty_like(hidden_BLD))
        return cls(kept=kept, peak=live.peak)
