"""RULER's tasks, solved by readers that see nothing but the prompt."""

import re
from collections import Counter
from random import Random

import pytest

from vllm_kvcompress.bench.quality.ruler import (
    NIAH,
    common_words,
    frequent_words,
    niah,
    variable_tracking,
)
from vllm_kvcompress.bench.quality.scoring import score

ONE_ANSWER = [name for name, task in NIAH.items() if task.asked == task.values == 1]
OTHERS = {"vt": variable_tracking, "cwe": common_words, "fwe": frequent_words}
EVERY = [*NIAH, *OTHERS]


def count(text):
    """About what a trained tokenizer makes of English."""
    return len(re.findall(r"\w{1,4}|[^\w\s]|\n\n", text))


def make(name, seed=1, length=4096, depth=None):
    if name in NIAH:
        return niah(name, Random(seed), length, count, depth)
    return OTHERS[name](Random(seed), length, count)


def parted(case):
    cut = len(case.prompt) - case.question_characters
    return case.prompt[:cut], case.prompt[cut:].strip()


def solve_niah(context, question):
    found = re.fullmatch(r"What (?:is|are all) the (secret \w+?)s? of (.+) that .*\?", question)
    keys = re.split(", | and ", found[2])
    return {v for k in keys for v in re.findall(rf"The {found[1]} of {k} is (\S+)\.", context)}


def solve_vt(context, question):
    wanted = re.search(r"the value (\d+)", question)[1]
    held = {}
    for variable, source in re.findall(r"VAR ([A-Z]+) = ([^.]+)\.", context):
        held[variable] = held[source.removeprefix("VAR ")] if "VAR" in source else source
    return {variable for variable, value in held.items() if value == wanted}


def solve_cwe(context, question):
    n = int(re.search(r"Which (\d+) words", question)[1])
    return most_frequent(re.findall(r"\d+\. (\S+)", context.rsplit("\n\n", 1)[1]), n)


def solve_fwe(context, question):
    words = context.rsplit("\n\n", 1)[1].split()
    return most_frequent([word for word in words if word != "..."], 3)


def most_frequent(words, n):
    ranked = Counter(words).most_common(n + 1)
    assert ranked[n - 1][1] > ranked[n][1], "a tie"
    return {word for word, _ in ranked[:n]}


SOLVERS = {"vt": solve_vt, "cwe": solve_cwe, "fwe": solve_fwe}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("length", [1024, 4096])
def test_a_reader_of_the_prompt_finds_the_answers(name, length):
    for seed in range(8):
        case = make(name, seed, length)
        found = SOLVERS.get(name, solve_niah)(*parted(case))
        assert found == set(case.answer) and len(found) == len(case.answer)
        assert score(case, f"They are {', '.join(found)}.") == 1
        assert score(case, next(iter(found))) == pytest.approx(1 / len(found))
        assert score(case, "I do not know.") == 0


@pytest.mark.parametrize(
    ("name", "answers"),
    {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}.items(),
)
def test_there_are_as_many_answers_as_published(name, answers):
    assert len(make(name).answer) == answers


@pytest.mark.parametrize("name", NIAH)
def test_the_question_does_not_give_the_answer_and_the_context_gives_it_once(name):
    for seed in range(5):
        case = make(name, seed)
        context, question = parted(case)
        assert all(context.count(each) == 1 and each not in question for each in case.answer)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("niah_single_1", r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_single_3", r"[a-z]+-[a-z]+", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        ("niah_multikey_3", r"[0-9a-f-]{36}", r"[0-9a-f-]{36}"),
    ],
)
def test_keys_and_values_are_of_the_published_kinds(name, key, value):
    case = make(name)
    assert re.fullmatch(value, case.answer[0])
    assert re.search(rf" of {key} that", parted(case)[1])


def test_haystacks_are_of_the_published_kinds():
    def words(name):
        return set(parted(make(name))[0].split())

    def stated(name):
        return len(re.findall(r"The secret \w+ of \S+ is", make(name).prompt))

    assert len(words("niah_single_1")) < 50 < 150 < len(words("niah_single_2"))
    assert [stated(name) for name in ("niah_single_2", "niah_multikey_1")] == [1, 4]
    assert stated("niah_multikey_2") > 100 and stated("niah_multikey_3") > 40


def test_common_words_are_ten_times_as_frequent_as_the_others_where_there_is_room():
    for length, frequencies in ((1024, {5, 1}), (1536, {10, 1}), (4096, {30, 3})):
        listed = parted(make("cwe", length=length))[0].rsplit("\n\n", 1)[1]
        assert set(Counter(re.findall(r"\d+\. (\S+)", listed)).values()) == frequencies


def test_coded_words_follow_the_published_zipf_law():
    counts = Counter(parted(make("fwe", length=16384))[0].rsplit("\n\n", 1)[1].split())
    (dots, n), *others = counts.most_common(5)
    assert dots == "..."
    for rank, (_, times) in enumerate(others, 2):
        assert times == pytest.approx(n * rank**-2.0, abs=1)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("length", [4096, 20_000])
def test_prompts_have_their_length_within_two_percent_and_never_more(name, length):
    for seed in range(3):
        case = make(name, seed, length)
        assert 0.98 * length <= count(case.prompt) <= length == case.length


@pytest.mark.parametrize("name", EVERY)
def test_a_length_too_short_is_refused_with_the_least_one(name):
    with pytest.raises(ValueError, match=r"at least [\d,]+ tokens are needed"):
        make(name, length=40)


@pytest.mark.parametrize("name", EVERY)
def test_the_same_seed_makes_the_same_case(name):
    assert make(name, 3) == make(name, 3)
    assert make(name, 3) != make(name, 4)


@pytest.mark.parametrize("name", EVERY)
def test_a_generator_is_drawn_from_alike_whatever_the_length_is(name):
    after = []
    for length in (1536, 8192):
        rng = Random(1)
        if name in NIAH:
            niah(name, rng, length, count)
        else:
            OTHERS[name](rng, length, count)
        after.append(rng.random())
    assert after[0] == after[1]


@pytest.mark.parametrize("name", ONE_ANSWER)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_fact_asked_for_stands_at_its_depth(name, depth):
    for seed in range(3):
        case = make(name, seed, length=8192, depth=depth)
        haystack = parted(case)[0].split("\n\n", 1)[1]
        start = haystack.index(case.answer[0])
        assert case.depth == depth
        assert abs(start / len(haystack) - depth) < 0.03


def test_without_a_depth_facts_stand_anywhere():
    depths = [make("niah_single_2", seed).depth for seed in range(40)]
    assert min(depths) < 0.15 and max(depths) > 0.85
