"""The sweep judges answers as the model itself would, and holds what the engine would hold."""

from random import Random

import pytest
import torch

from vllm_kvcompress.bench import policy_sweep
from vllm_kvcompress.bench.policy_reader import Reader
from vllm_kvcompress.bench.policy_sweep import (
    ABLATIONS,
    TASKS,
    ablations,
    kept_tokens,
    make_cases,
    score,
)
from vllm_kvcompress.presets import shipped_presets

pytestmark = pytest.mark.skipif(
    not (policy_sweep.MODEL / "model.safetensors").exists(), reason="no demo model"
)


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(policy_sweep.MODEL)


@pytest.mark.parametrize("task", TASKS)
def test_an_answer_counts_exactly_when_greedy_decoding_writes_it(reader: Reader, task) -> None:
    for seed in range(3):
        ids, answer = reader.encode(TASKS[task](Random(seed), 192))
        reading = reader.read(ids)
        everything = torch.ones(1, len(reading.keys), reader.heads, len(ids), dtype=torch.bool)
        text = ids
        for _ in answer:
            logits = reader.model(text.unsqueeze(0)).logits
            text = torch.cat([text, logits[0, -1:].argmax(dim=-1)])
        written = text[len(ids) :]
        right = reader.answers_right(reading, written, everything)
        assert right.tolist() == [True], "what greedy decoding writes is what counts"
        wrong = written.clone()
        wrong[-1] += 1
        assert reader.answers_right(reading, wrong, everything).tolist() == [False]
        assert bool(reader.answers_right(reading, answer, everything)) == written.equal(answer)


def test_what_is_gone_is_not_seen(reader: Reader) -> None:
    """A cache without some tokens answers as the model does with these tokens masked."""
    ids, _ = reader.encode(TASKS["needle"](Random(0), 192))
    reading = reader.read(ids)
    gone = slice(20, 150)
    seen = torch.ones(2, len(reading.keys), reader.heads, len(ids), dtype=torch.bool)
    seen[1, ..., gone] = False
    cache = reader.model(ids.unsqueeze(0), use_cache=True).past_key_values
    mask = torch.ones(1, len(ids) + 1)
    mask[:, gone] = 0
    first = reading.last_logits.argmax()
    out = reader.model(
        first.view(1, 1),
        past_key_values=cache,
        attention_mask=mask,
        position_ids=torch.tensor([[len(ids)]]),
    )
    answer = torch.stack([first, out.logits[0, -1].argmax()])
    assert reader.answers_right(reading, answer, seen).tolist()[1]


def test_held_share_counts_pages_and_tail(reader: Reader) -> None:
    ids, _ = reader.encode(TASKS["needle"](Random(1), 200))
    reading = reader.read(ids)
    presets = [shipped_presets()[name] for name in ("kv-compress", "random")]
    cases = make_cases(presets, [4], [32], reader.layers)
    n = len(ids)
    for case in cases:
        seen, share = kept_tokens(case, score(case, reading, reader.scale))
        assert seen[..., n // 32 * 32 :].all()
        assert float(seen.float().mean()) == pytest.approx(share)
        assert share == pytest.approx((2 * 32 + n % 32) / n)  # ceil((n/4 - t)/32) = 2 blocks


def test_every_ablation_changes_the_default_in_its_own_way() -> None:
    default = shipped_presets()["kv-compress"]
    presets = ablations(default)
    assert presets[0] == default and [p.name for p in presets[1:]] == list(ABLATIONS)
    unnamed = [p.model_copy(update={"name": ""}).model_dump_json() for p in presets]
    assert len(set(unnamed)) == len(presets)
    assert len(make_cases(presets, [8], [32], 4)) == len(presets)
