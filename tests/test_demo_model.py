"""The shipped demo model: any text can be typed at it, its language is exact, it finds facts."""

import json
import re
from pathlib import Path
from random import Random

import pytest

from vllm_kvcompress import accounting
from vllm_kvcompress.bench.demo_model import language
from vllm_kvcompress.bench.demo_model.card import EXAMPLE, depth_table, render_card
from vllm_kvcompress.bench.demo_model.evaluate import Reader, measure
from vllm_kvcompress.bench.demo_model.tokenizer import ATTACHED, build_tokenizer, vocabulary
from vllm_kvcompress.bench.demo_model.words import WORDS

MODEL = Path(accounting.__file__).parent / "demo_model"
TEXTS = (
    "The code of amber is river seven stone. What is the code of amber?",
    "  Grüße, 日本語 🎉\tand a tab,\r\n\n two  spaces and no end",
    "3.14159 and 1,000,000; ٣ ½ \x00\x7f",
    "AMBER aMbEr isis amber  is what is What is this is",
    "def f(x):\n    return x['?'] is None  # <|not special|>",
    " ",
    "",
)
TASKS = {
    "needle": lambda rng, n: language.needle_task(rng, n, 0.5),
    "needle, number": lambda rng, n: language.needle_task(rng, n, 0.5, value="number"),
    "needle, plain": lambda rng, n: language.needle_task(rng, n, 0.25, form="plain"),
    "many facts": lambda rng, n: language.many_facts_task(rng, n, 16),
    "span": lambda rng, n: language.span_task(rng, n, 1.0),
}


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(MODEL)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_from_the_tokenizer(reader, text):
    ids = reader.tokenizer.encode(text, add_special_tokens=False)
    assert reader.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_random_unicode_comes_back_from_the_tokenizer(reader):
    rng = Random(7)
    for _ in range(200):
        points = [rng.randrange(0x20, 0x3000) for _ in range(40)]
        text = "".join(map(chr, points))
        ids = reader.tokenizer.encode(text, add_special_tokens=False)
        assert reader.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_every_word_is_one_token_in_every_spelling(reader):
    for word in WORDS:
        for attached in ("", *ATTACHED):
            for spelling in (word, f" {word}", word.capitalize(), f" {word.capitalize()}"):
                if (word, attached) == ("what", " is"):
                    continue
                ids = reader.tokenizer.encode(spelling + attached, add_special_tokens=False)
                assert len(ids) == 1, spelling + attached


def test_shipped_tokenizer_is_the_one_the_code_builds():
    shipped = json.loads((MODEL / "tokenizer.json").read_text())
    assert shipped == json.loads(build_tokenizer().to_str())


@pytest.mark.parametrize("n_tokens", [256, 1000])
@pytest.mark.parametrize("name", TASKS)
def test_prompts_have_exactly_the_tokens_asked_for(reader, name, n_tokens):
    task = TASKS[name](Random(5), n_tokens)
    prompt = reader.tokenizer.encode(task.prompt, add_special_tokens=False)
    assert task.length_tokens == len(prompt) == n_tokens
    if task.form == "chat":
        assert len(reader.encode(task).prompt) == n_tokens + language.CHAT_TOKENS


@pytest.mark.parametrize("name", TASKS)
def test_language_is_decided_by_the_seed(name):
    first, again, other = (TASKS[name](Random(seed), 512) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_a_fact_stands_once_and_at_its_depth(depth):
    task = language.needle_task(Random(3), 2048, depth)
    assert task.prompt.count(task.answer) == 1
    before, after = task.prompt.split(task.answer)
    assert len(before) / (len(before) + len(after)) == pytest.approx(depth, abs=0.03)


def test_training_rows_are_exact_and_are_read_as_they_are_written():
    tokenizer, vocab = build_tokenizer(), vocabulary()
    mix = language.Mix((0.1, 0.9), (1, 32), 8, recital_rate=0.1)
    for seed in range(100):
        row = language.training_row(Random(seed), 64 + 5 * seed, mix)
        assert len(row.pieces) == len(row.is_answer) == 64 + 5 * seed
        ids = tokenizer.encode("".join(row.pieces), add_special_tokens=False).ids
        assert ids == [vocab[piece] for piece in row.pieces]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: language.needle_task(Random(0), 8, 0.5), "n_tokens is 8"),
        (lambda: language.needle_task(Random(0), 128, 1.5), "depth is 1.5"),
        (lambda: language.many_facts_task(Random(0), 4096, 65), "choose 1 to 64"),
        (lambda: language.needle_task(Random(0), 128, 0.5, value="poem"), "words, number"),
    ],
)
def test_impossible_tasks_are_refused_with_what_is_allowed(make, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        make()


def test_model_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 10_000_000


def test_card_and_shipped_numbers_agree():
    card = (MODEL / "README.md").read_text()
    evaluation = json.loads((MODEL / "evaluation.json").read_text())
    assert card == render_card(MODEL)
    for table in ("needle", "needle_truncated"):
        cells = evaluation[table]
        assert depth_table(cells) in card
        for cell in cells.values():
            assert cell["recall"] == pytest.approx(cell["right"] / cell["n"], abs=1e-4)
            assert f"{cell['recall']:.3f}" in card


def test_facts_are_found_with_the_full_cache(reader):
    rng = Random(11)
    found = measure(reader, lambda: language.needle_task(rng, 1024, rng.random()), 20)
    assert found["recall"] >= 0.95


def test_facts_that_were_cut_off_are_not_found(reader):
    rng = Random(11)
    found = measure(reader, lambda: language.needle_task(rng, 1024, 0.3), 10, share=0.25)
    assert found["recall"] == 0


def test_the_example_of_the_card_is_answered_and_generation_stops(reader):
    assert EXAMPLE in (MODEL / "README.md").read_text()
    turn = [{"role": "user", "content": EXAMPLE}]
    ids = reader.tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    out = reader.model.generate(ids, max_new_tokens=16)[0, ids.shape[1] :]
    assert reader.tokenizer.decode(out, skip_special_tokens=True).strip() == "river seven stone."
    assert out[-1] == reader.tokenizer.eos_token_id
