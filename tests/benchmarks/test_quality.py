"""The quality bench without an engine: what is asked, kept on disk, averaged, judged and shown."""

import resource
from dataclasses import replace
from math import nan

import pytest

from vllm_kvcompress import accounting
from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.quality import judge, plots, show
from vllm_kvcompress.bench.quality.ask import Answer, Prompt, held_tokens
from vllm_kvcompress.bench.quality.case import Case
from vllm_kvcompress.bench.quality.encode import encode
from vllm_kvcompress.bench.quality.rows import PLAIN, Cell, Group, Outcome, Row, cells, grouped
from vllm_kvcompress.bench.quality.run import CannotOpen, Phase, Plan, run
from vllm_kvcompress.bench.quality.store import Store
from vllm_kvcompress.presets import shipped_presets

PRESETS = shipped_presets()
FULL, OURS, CHANCE = Row(PLAIN, "plain"), Row("kv-compress", "preset", 0.5), Row(
    "random", "preset", 0.5
)  # fmt: skip
PRESS = Row("kvpress:KnormPress", "peer", 0.5)
SUBJECT = {"model": "m", "block_tokens": 32}


def case(number: int, **fields) -> Case:
    return Case(prompt=f"what is {number}?", answer=str(number), task="count", length=640, **fields)


CASES = [case(i) for i in range(10)]


class Knows:
    """Answers right where `right(ask)`; counts what it is asked and can die on the way."""

    def __init__(self, right=lambda ask: True, dies_after=None) -> None:
        self.right, self.dies_after, self.asked = right, dies_after, []

    def __enter__(self):
        return self

    def __exit__(self, *raised) -> None:
        pass

    def answers(self, asks):
        for ask in asks:
            if self.dies_after is not None and len(self.asked) == self.dies_after:
                raise BenchError("the engine has ended: out of memory")
            self.asked.append(ask)
            number = str(ask.prompt.token_ids[0])
            yield Answer(number if self.right(ask) else "no idea")


def plan(cases=CASES, modes=(False,), context=640, question=40) -> Plan:
    prompts = {
        c.key: Prompt((int(c.answer[0]),) * (context + question), question, 4) for c in cases
    }
    return Plan(cases, prompts, modes, 32, PRESETS)


def asked_and_cells(tmp_path, rows, answerer, the_plan=None, name="a.jsonl"):
    the_plan = the_plan or plan()
    with Store(tmp_path / name, SUBJECT) as store:
        absent = run(the_plan, [Phase(rows, lambda: answerer)], store)
        return cells(the_plan.cases, rows, the_plan.modes, store.outcomes.values(), absent)


# What a row may hold


@pytest.mark.parametrize(
    ("context", "budget", "expected"),
    [
        (1024, 0.5, 16 * 32),
        (1027, 0.125, 4 * 32 + 3),  # 131 is nearer to 128.4 than 99
        (1027, 0.03125, 32 + 3),
        (1044, 0.03125, None),  # a page and the 20 tokens of the tail are 60 % too many
        (640, 0.03125, None),  # 20 tokens are less than a page
        (64, 1.0, None),  # everything
    ],
)
def test_a_budget_becomes_whole_pages_and_the_tail(context, budget, expected):
    assert held_tokens(context, budget, 32, PRESETS["kv-compress"]) == expected
    assert held_tokens(context, budget, 32, None) == expected


def test_a_preset_that_protects_more_cannot_reach_what_another_can():
    assert PRESETS["snapkv"].window_tokens >= 64 <= PRESETS["snapkv"].recent_tokens
    assert held_tokens(1024, 0.03125, 32, PRESETS["snapkv"]) is None
    assert held_tokens(1024, 0.03125, 32, PRESETS["kv-compress"]) == 32


def test_knobs_ask_for_just_those_tokens():
    ask = plan().ask(CASES[0], OURS, unseen=True)
    assert ask.knobs() == {
        "kv_compress": "kv-compress",
        "kv_compress_budget": 320,
        "kv_compress_question": 40,
    }
    settings = PRESETS["kv-compress"].settings(budget_tokens=320, question_tokens=40)
    planned = accounting.plan(680, 32, 10_000, settings)
    assert accounting.held_share(planned) == 320 / 640 == ask.held_tokens / ask.context_tokens
    assert plan().ask(CASES[0], FULL, unseen=False).knobs() == {"kv_compress": "off"}


def test_a_peer_is_held_to_the_same_number_and_to_the_wish_where_pages_cannot_go():
    assert plan().ask(CASES[0], PRESS, unseen=True).held_tokens == 320
    tiny = plan().ask(CASES[0], replace(PRESS, budget=0.01), unseen=True)
    assert tiny.held_tokens == 6
    assert plan().ask(CASES[0], replace(OURS, budget=0.01), unseen=True) is None


# Tokens


class Letters:
    """A tokenizer of one token a letter, whose chat template wraps a turn in < and >:."""

    max_model_len = 4096

    def chat_ids(self, prompt):
        return [*map(ord, f"<{prompt}>:")]

    def plain_ids(self, text, special):
        return [*map(ord, "^" * special + text)]


def test_the_question_is_what_follows_the_context_template_included():
    asked = case(7, question_characters=len("7?"))
    prompt = encode(asked, Letters())
    assert prompt.question_tokens == len("7?>:")
    assert prompt.max_tokens == len(" 7")
    plain = encode(asked.model_copy(update={"form": "plain", "max_tokens": 9}), Letters())
    assert plain.question_tokens == len("7?") and plain.max_tokens == 9
    assert encode(case(7), Letters()).question_tokens == 0


# Running, stopping, going on


def test_scores_are_averaged_over_all_cases_of_a_row(tmp_path):
    full, ours = asked_and_cells(
        tmp_path,
        [FULL, OURS],
        Knows(lambda ask: ask.preset == "off" or ask.prompt.token_ids[0] > 2),
    )
    assert (full.score, ours.score, ours.held_share) == (1.0, 0.7, 328 / 680)


def test_an_unreachable_budget_is_not_asked_and_prints_a_dash(tmp_path):
    answerer = Knows()
    tiny = replace(OURS, budget=0.03125)
    (cell,) = asked_and_cells(tmp_path, [tiny], answerer, plan(context=300, question=0))
    assert not answerer.asked and cell.text == "-"
    (table,) = show.quality_tables([cell])
    assert table.rows[0][-1] == "-" and "cannot get there" in table.note


def test_cases_that_cannot_reach_a_budget_are_left_out_of_every_comparison(tmp_path):
    prompts = {
        c.key: Prompt((int(c.answer[0]),) * (640 if i < 6 else 30), 0, 4)
        for i, c in enumerate(CASES)
    }
    rows = [FULL, OURS, PRESS]
    full, ours, press = asked_and_cells(
        tmp_path, rows, Knows(), Plan(CASES, prompts, [False], 32, PRESETS)
    )
    assert (len(full.scores), len(ours.scores), len(press.scores)) == (10, 6, 10)
    assert ours.of(full) == 1.0
    (pair,) = judge.pairings([full, ours, press])
    assert pair.gain == 0 and pair.p == 1
    assert "(n = 6)" in show.quality_tables([full, ours, press])[0].rows[1][2]


def test_the_full_cache_is_asked_once_for_both_kinds_of_question(tmp_path):
    answerer = Knows()
    the_plan = plan(modes=(False, True))
    found = asked_and_cells(tmp_path, [FULL, OURS], answerer, the_plan)
    assert len(answerer.asked) == 30
    assert [c.group.unseen for c in found] == [False, False, True, True]
    assert [c.score for c in found] == [1.0] * 4
    only_unseen = asked_and_cells(tmp_path, [FULL, OURS], Knows(), plan(modes=(True,)), "b.jsonl")
    assert [len(c.scores) for c in only_unseen] == [10, 10]


def test_a_run_that_died_goes_on_where_it_stopped_and_ends_with_the_same_table(tmp_path):
    right = lambda ask: ask.prompt.token_ids[0] % 3 > 0  # noqa: E731
    whole = asked_and_cells(tmp_path, [FULL, OURS], Knows(right), name="whole.jsonl")
    with pytest.raises(BenchError, match="out of memory"):
        asked_and_cells(tmp_path, [FULL, OURS], Knows(right, dies_after=7))
    path = tmp_path / "a.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # cut in the middle of the last line
    rest = Knows(right)
    assert asked_and_cells(tmp_path, [FULL, OURS], rest) == whole
    assert len(rest.asked) == 20 - 6
    assert asked_and_cells(tmp_path, [FULL, OURS], Knows(right, dies_after=0)) == whole


def test_half_a_run_shows_how_far_it_got(tmp_path):
    with Store(tmp_path / "a.jsonl", SUBJECT) as store:
        with pytest.raises(BenchError):
            run(plan(), [Phase([FULL, OURS], lambda: Knows(dies_after=13))], store)
        full, ours = cells(CASES, [FULL, OURS], [False], store.outcomes.values(), {})
    assert (full.text, ours.text) == ("7 of 10 cases", "6 of 10 cases")


def test_a_row_that_cannot_be_had_says_why_and_the_others_run(tmp_path):
    def refuse():
        raise CannotOpen("fp8 needs AVX-512")

    fp8 = Row("fp8 KV cache", "fp8")
    with Store(tmp_path / "a.jsonl", SUBJECT) as store:
        absent = run(plan(), [Phase([fp8], refuse), Phase([FULL], Knows)], store)
        found = cells(CASES, [FULL, fp8], [False], store.outcomes.values(), absent)
    (table,) = show.quality_tables(found)
    assert [row[1] for row in table.rows] == ["100.0", "none"]
    assert "fp8 KV cache: fp8 needs AVX-512." in table.note


def test_answers_of_another_model_are_not_taken_for_this_ones(tmp_path):
    with Store(tmp_path / "a.jsonl", SUBJECT) as store:
        store.add(Outcome("c", "r", False))
    with pytest.raises(BenchError, match=r"'block_tokens': 32.*'block_tokens': 16.*--fresh"):
        Store(tmp_path / "a.jsonl", {**SUBJECT, "block_tokens": 16}).__enter__()
    with Store(tmp_path / "a.jsonl", {**SUBJECT, "block_tokens": 16}, fresh=True) as store:
        assert not store.outcomes
    (tmp_path / "b.jsonl").write_text("a shopping list\n")
    with pytest.raises(BenchError, match="no file of outcomes"):
        Store(tmp_path / "b.jsonl", SUBJECT).__enter__()


def test_two_runs_do_not_write_to_one_file(tmp_path):
    with Store(tmp_path / "a.jsonl", SUBJECT), pytest.raises(BenchError, match="another run"):
        Store(tmp_path / "a.jsonl", SUBJECT).__enter__()


def test_a_full_disk_ends_in_one_line_and_keeps_what_was_done(tmp_path):
    path = tmp_path / "a.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with Store(path, SUBJECT) as store, pytest.raises(BenchError, match="answers are kept"):
            run(plan(), [Phase([FULL, OURS], Knows)], store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with Store(path, SUBJECT) as store:
        kept = len(store.outcomes)
        assert 3 < kept < 20
        rest = Knows()
        run(plan(), [Phase([FULL, OURS], lambda: rest)], store)
        assert len(rest.asked) == 20 - kept


# Judging


def group_cells(full=10, **right) -> list[Cell]:
    group = Group("needle", 1024, False)
    rows = {"full": FULL, "ours": OURS, "chance": CHANCE, "press": PRESS}
    counts = {"full": full, **right}
    return [
        Cell(group, rows[name], 10, {str(i): float(i < count) for i in range(10)}, 0.5)
        for name, count in counts.items()
    ]


def test_a_policy_that_loses_most_of_what_the_full_cache_answers_is_caught():
    kept, lost = judge.verdicts(group_cells(ours=10)), judge.verdicts(group_cells(ours=4))
    assert all(verdict.met for verdict in kept) and len(kept) == 2
    assert not any(verdict.met for verdict in lost)
    assert "0.400, target at least 0.5" in lost[0].text()


def test_chance_is_a_control_and_not_judged():
    assert len(judge.verdicts(group_cells(ours=10, chance=0))) == 2


def test_a_task_that_the_full_cache_cannot_do_judges_nobody():
    assert not judge.verdicts(group_cells(full=0, ours=0))


def test_a_better_peer_is_named():
    *_, verdict = judge.verdicts(group_cells(ours=2, press=9))
    assert not verdict.met
    assert "the best peer, kvpress:KnormPress" in verdict.text()
    assert "worse on 7 of 10, p = 0.016" in verdict.text() and "MISSED" in verdict.text()


@pytest.mark.parametrize("press", [7, 9])
def test_what_chance_explains_is_no_difference(press):
    *_, verdict = judge.verdicts(group_cells(ours=7, press=press))
    assert verdict.met and verdict.measured.median == 0


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(0, 0, 1.0), (6, 0, 0.03125), (5, 5, 1.0), (9, 1, 22 / 1024)]
)
def test_the_sign_test_is_the_binomial_one(better, worse, p):
    group = Group("t", None, False)
    scores = [(1.0, 0.0)] * better + [(0.0, 1.0)] * worse + [(1.0, 1.0)] * 3
    ours, theirs = ({str(i): pair[k] for i, pair in enumerate(scores)} for k in (0, 1))
    pair = judge.Pairing(Cell(group, OURS, 9, ours), Cell(group, CHANCE, 9, theirs))
    assert (pair.better, pair.worse, pair.p) == (better, worse, pytest.approx(p))


# Showing


def test_tables_stand_by_held_share():
    found = group_cells(ours=9, press=5)
    found[2] = replace(found[2], held_share=0.44)
    (table,) = show.quality_tables(found)
    assert table.title == "needle, 1,024 tokens, n = 10"
    assert list(table.columns) == ["policy", "100 %", "50 %"]
    assert [list(row) for row in table.rows] == [
        [PLAIN, "100.0", ""],
        ["kv-compress", "", "90.0"],
        ["kvpress:KnormPress", "", "50.0 (44 % held)"],
    ]
    assert [row[6:8] for row in show.flat_table(found).rows] == [
        ["10", "1.0000"],
        ["10", "0.9000"],
        ["10", "0.5000"],
    ]


def test_the_mean_over_tasks_stands_only_where_every_task_has_a_number():
    span = Group("span", 1024, False)
    found = group_cells(ours=9)
    assert show.mean_table(found) is None
    tiny = replace(OURS, budget=0.25)
    found += [replace(c, group=span, scores={"0": 0.5}, asked=1) for c in found]
    found += [replace(found[1], row=tiny), Cell(span, tiny, 1, text="-")]
    rows = show.mean_table(found).rows
    assert [list(row) for row in rows] == [
        [PLAIN, "75.0", "", ""],
        ["kv-compress", "", "70.0", "-"],
    ]


def test_many_different_lengths_make_one_table():
    cases = [case(i).model_copy(update={"length": 100 + i}) for i in range(20)]
    assert list(grouped(cases, False)) == [Group("count", None, False)]
    assert len(grouped(cases[:3], False)) == 3


def test_pictures_are_drawn_where_there_is_something_to_draw(tmp_path):
    found = group_cells(ours=9, press=5)
    assert plots.accuracy_over_held_share(found, tmp_path / "a.png")
    assert plots.bars_per_task(found, 0.5, tmp_path / "b.png")
    assert not plots.bars_per_task(found, 0.25, tmp_path / "c.png")
    deep = [c.model_copy(update={"depth": i / 9}) for i, c in enumerate(CASES)]
    outcomes = [Outcome(c.key, FULL.key, False, score=1.0) for c in deep]
    assert plots.heat_map(deep, [FULL], outcomes, tmp_path / "d.png")
    assert not plots.heat_map(CASES, [FULL], outcomes, tmp_path / "e.png")
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == ["a.png", "b.png", "d.png"]
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_an_empty_cell_has_no_score():
    assert str(Cell(Group("t", None, False), FULL, 3).score) == str(nan)
