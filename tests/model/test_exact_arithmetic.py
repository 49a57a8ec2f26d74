"""Float32 arithmetic on weights of any dtype, and nothing left behind."""

import pytest
import torch
from tiny_models import FAMILIES, build_model

from fastpref.model.exact_arithmetic import computing_in, exact_arithmetic

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_stored_in_16_bits_computes_in_float32_and_is_as_it_was(family, dtype):
    narrow, wide = build_model(family).eval(), build_model(family).eval()
    for parameter, other in zip(narrow.parameters(), wide.parameters(), strict=True):
        parameter.data = parameter.data.to(dtype)
        other.data = parameter.data.float()
    stored = [parameter.data for parameter in narrow.parameters()]
    with exact_arithmetic(narrow):
        logits = narrow(input_ids=IDS).logits
        # of the body alone as well
        hidden = narrow.base_model(input_ids=IDS).last_hidden_state
    assert torch.equal(logits, wide(input_ids=IDS).logits)
    assert torch.equal(hidden, wide.base_model(input_ids=IDS).last_hidden_state)
    for parameter, before in zip(narrow.parameters(), stored, strict=True):
        assert parameter.data_ptr() == before.data_ptr() and parameter.dtype == dtype
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in narrow.modules())


@torch.no_grad()
def test_a_block_at_a_time_is_wide_and_after_an_error_none():
    model = build_model("llama").bfloat16()
    wide = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(
            lambda *_: wide.append([p.dtype for p in model.model.layers.parameters()])
        )
    with exact_arithmetic(model):
        model(input_ids=IDS)
    half = len(wide[0]) // 2
    assert wide == [
        [torch.float32] * half + [torch.bfloat16] * half,
        [torch.bfloat16] * half + [torch.float32] * half,
    ]
    with pytest.raises(IndexError), exact_arithmetic(model):
        model(input_ids=torch.tensor([[500]]))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_what_reads_the_dtype_of_its_head_sees_that_of_the_arithmetic():
    model = build_model("llama").bfloat16()
    seen = []
    model.register_forward_pre_hook(lambda *_: None)
    model.model.norm.register_forward_hook(
        lambda *_: seen.append((model.lm_head.weight.dtype, next(model.parameters()).dtype))
    )
    for dtype in (torch.float32, torch.float16):
        with computing_in(model, dtype):
            model(input_ids=IDS)
        assert seen.pop() == (dtype, dtype)
