"""FlexAttention's blocks against those that torch finds by computing the mask of all tokens."""

import random

import pytest
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from fastpref.batch import EncodedRow
from fastpref.batches.packed import pack_rows
from fastpref.memory.live_bytes import LiveBytes
from fastpref.model.attention.flex import BLOCK, block_mask


def rows_of(draw: random.Random, num_rows: int, longest: int) -> list[EncodedRow]:
    """Pairs with a shared prompt, of lengths from 1 to `longest` each part."""
    parts = [[range(draw.randint(1, longest)) for _ in range(3)] for _ in range(num_rows)]
    return [EncodedRow(*part) for part in parts]


def tables(mask: BlockMask) -> list[list[list[int]]]:
    """Blocks of keys for each block of queries, masked and full; then of queries for keys."""
    names = ("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")
    names += ("q_num_blocks", "q_indices"), ("full_q_num_blocks", "full_q_indices")
    return [
        [
            indices[:count].tolist()
            for count, indices in zip(
                getattr(mask, counts)[0, 0], getattr(mask, places)[0, 0], strict=True
            )
        ]
        for counts, places in names
    ]


@pytest.mark.parametrize("window", [None, 1, 7, 128, 300])
@pytest.mark.parametrize("longest", [40, 400])
def test_blocks_are_those_of_the_whole_mask(window, longest):
    draw = random.Random(longest)
    found_full = False
    for num_rows in (1, 2, 5):
        layout = pack_rows(rows_of(draw, num_rows, longest), pad_token_id=0).layout
        T = layout.segments[-1].stop
        ours = block_mask(layout, window)
        theirs = create_block_mask(ours.mask_mod, None, None, T, T, device="cpu", BLOCK_SIZE=BLOCK)
        assert tables(ours) == tables(theirs)
        assert ours.shape == theirs.shape and ours.seq_lengths == theirs.seq_lengths
        found_full |= bool(ours.full_kv_num_blocks.any())
    assert found_full == (longest == 400 and window in (None, 300))


def test_no_mask_of_all_tokens_is_made():
    layout = pack_rows(rows_of(random.Random(0), 10, 400), pad_token_id=0).layout
    T = layout.segments[-1].stop
    with LiveBytes() as live:
        block_mask(layout, 300)
    assert live.peak < T * T / 8
