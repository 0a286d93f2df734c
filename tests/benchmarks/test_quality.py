from dataclasses import replace

import pytest

from vllm_kvcompress.bench.quality import Cell, held_share, tables, verdicts

FULL = [True] * 90 + [False] * 10


def cell(policy: str, right: int, rate: float = 8.0) -> Cell:
    answers = [i < right for i in range(100)]
    return Cell("needle", 2048, policy, rate, 0.125, answers, FULL)


def test_accuracy_is_paired_with_the_full_cache():
    ours = cell("kv-compress", 88)
    assert ours.accuracy == 0.88
    assert ours.of_full == pytest.approx(88 / 90)
    assert ours.lost == 2


def test_an_answer_found_only_without_the_full_cache_is_no_loss():
    lucky = replace(cell("kv-compress", 0), right=[not full for full in FULL])
    assert lucky.lost == 90 and lucky.accuracy == 0.1


def test_the_held_share_is_what_the_engine_holds():
    assert held_share(Cell("needle", 2048, "kv-compress", 8), 2048) == 8 * 32 / 2048
    assert held_share(Cell("needle", 2048, "kv-compress", 8), 2051) == (8 * 32 + 3) / 2051
    assert held_share(Cell("needle", 2048, "kv-compress", 1), 2048) == 1


def test_a_policy_that_forgets_is_flagged():
    good, bad = [cell("kv-compress", 88), cell("random", 9)], [cell("kv-compress", 80)]
    assert [verdict.met for verdict in verdicts(good)] == [True, True]
    assert [verdict.met for verdict in verdicts(bad)] == [False]


def test_chance_as_good_as_the_policy_is_flagged():
    ours, chance = verdicts([cell("kv-compress", 89), cell("random", 89)])
    assert ours.met and not chance.met


def test_tables_show_the_share_of_full():
    text = tables([cell("kv-compress", 90), cell("random", 9)])
    assert "full cache 90.0% right" in text
    assert "| kv-compress | 100.0 |" in text
    assert "| random | 10.0 |" in text
    assert "8x (12.5% held)" in text
