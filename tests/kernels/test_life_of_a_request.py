"""Score, keep, compact, derive tables, attend: all kernels in a row, against dense attention."""

import pytest
import torch
from kernels.caches import noise

from vllm_kvcompress.kernels import (
    Arenas,
    WindowScore,
    attend_pages,
    compact,
    fill_tables,
    score_window,
    split_pages,
)
from vllm_kvcompress.policy import build
from vllm_kvcompress.presets import shipped_presets

LAYERS, HEADS, GROUP, SIZE, B = 2, 2, 3, 64, 8
LANES = LAYERS * HEADS
PROMPT_BLOCKS, ARENA_BLOCKS, TAIL = 9, 3, 5
SCALE = SIZE**-0.5


@pytest.mark.parametrize("preset", ["kv-compress", "kv-compress-paper", "snapkv"])
def test_decode_after_compression_is_dense_attention_over_the_kept_tokens(preset):
    shipped = shipped_presets()[preset]
    full = PROMPT_BLOCKS * B
    order = torch.randperm(20)
    natural, arena_blocks = order[: PROMPT_BLOCKS + 1], order[-ARENA_BLOCKS:]
    pool = torch.full((20 * LANES, 1, B, 2 * SIZE), torch.nan)
    pages = natural * LANES + torch.arange(LANES).view(LAYERS, HEADS, 1)
    prompt = noise(LAYERS, HEADS, (PROMPT_BLOCKS + 1) * B, 2 * SIZE)
    prompt[:, :, full + TAIL :] = torch.nan
    pool[pages] = prompt.view(LAYERS, HEADS, -1, 1, B, 2 * SIZE)
    keys, values = split_pages(pool)

    window = noise(LAYERS, 4, HEADS, GROUP, SIZE, seed=2) * 3
    asked_at = torch.arange(full + TAIL - 4, full + TAIL)
    seen = torch.full((HEADS,), full + TAIL, dtype=torch.int32)
    rule = WindowScore(**shipped.scorer.params)
    scores = torch.stack(
        [
            score_window(
                window[layer],
                asked_at,
                keys,
                pages[layer],
                seen,
                torch.arange(full + TAIL),
                SCALE,
                rule,
            )
            for layer in range(LAYERS)
        ]
    )[..., :full]
    kept = build(shipped).keep(scores, ARENA_BLOCKS * LANES, B, sinks=1, recent=2)
    compact(keys, values, pages, full, kept.indices, arena_blocks)
    pool[pages[..., :PROMPT_BLOCKS]] = torch.nan  # the blocks are freed and used by others

    arenas = Arenas.allocate(1, LAYERS, HEADS, ARENA_BLOCKS, "cpu")
    arenas.put(0, arena_blocks, kept.pages, PROMPT_BLOCKS)
    tables = torch.full((LAYERS, 1, HEADS, PROMPT_BLOCKS + 1), 1 << 30, dtype=torch.int32)
    lengths = torch.empty(LAYERS, 1, HEADS, dtype=torch.int32)
    slots, seq_lens = torch.tensor([0]), torch.tensor([full + TAIL])
    fill_tables(arenas, slots.int(), natural[None].int(), seq_lens.int(), B, 0, tables, lengths)

    queries = noise(LAYERS, HEADS, GROUP, SIZE, seed=3)
    for layer in range(LAYERS):
        out = torch.empty(HEADS, GROUP, SIZE)
        table, length = tables[layer].flatten(0, 1), lengths[layer].flatten()
        attend_pages(queries[layer], keys, values, table, length, SCALE, out, splits=2)
        for head in range(HEADS):
            expected = dense(queries[layer, head], prompt[layer, head], chosen(kept, layer, head))
            torch.testing.assert_close(out[head], expected, atol=1e-5, rtol=1e-5)


def chosen(kept, layer, head):
    """Positions that the head holds: its kept ones and the tail."""
    full = PROMPT_BLOCKS * B
    mine = kept.indices[kept.indices // full == layer * HEADS + head] % full
    return torch.cat([mine, torch.arange(full, full + TAIL)])


def dense(queries, content, positions):
    keys, values = content[positions].split(SIZE, dim=-1)
    return torch.softmax(queries @ keys.T * SCALE, dim=-1) @ values
