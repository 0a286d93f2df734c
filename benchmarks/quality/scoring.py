"""How an answer is judged: a score in [0, 1] for every `match` of a case."""

import re
import string
from collections import Counter
from collections.abc import Callable

from vllm_kvcompress.bench.quality.case import Case, Match

LETTERS = frozenset("ABCD")
# Of a completed text only the answer is judged, not the next example that a model goes on with.
CUT_WHEN_COMPLETED: frozenset[Match] = frozenset({"f1", "rouge", "choice"})
_COMMENT = ("#", "//", "```")
_SAID_LETTER = re.compile(r"(?i:answer)(?:\s+is:?|:)\s*\(?([A-D])\b")
_LONE_LETTER = re.compile(r"\(?([A-D])(?:[).:,]|\s*$)", re.MULTILINE)
_NUMBER = re.compile("[0-9]+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_HAN_KANA = "\u3040-\u30ff\u3400-\u9fff"
_ROUGE_WORD = re.compile(rf"[{_HAN_KANA}]|[^\W_{_HAN_KANA}]+")

Metric = Callable[[str, str], float]


def score(case: Case, text: str) -> float:
    """How right `text` is: 0 to 1.

    exact: the same text, white space aside.
    contains: the answer stands somewhere in it, upper and lower case alike.
    contains-all: the share of the answers that do (RULER's `string_match_all`).
    rouge: ROUGE-L, the F measure.
    f1: the F measure of the words in common, as SQuAD and LongBench count them.
    choice: the letter A to D that was chosen, or the class that was named.
    code: the edit similarity of the first line of code (LongBench's `code_sim`).
    number: the share of the numbers in it that are the answer's (LongBench's counting and
        retrieval).

    The best answer counts where a case has several, but for `contains-all`. With `form` `plain`,
    `f1`, `rouge` and `choice` judge as many lines as the longest answer has.
    """
    if case.form == "plain" and case.match in CUT_WHEN_COMPLETED:
        text = _first_lines(text, max(answer.count("\n") + 1 for answer in case.answer))
    shares = [METRICS[case.match](answer, text) for answer in case.answer]
    return sum(shares) / len(shares) if case.match == "contains-all" else max(shares)


def exact(answer: str, text: str) -> float:
    return float(_one_space(text) == _one_space(answer))


def contains(answer: str, text: str) -> float:
    return float(_one_space(answer).casefold() in _one_space(text).casefold())


def rouge(answer: str, text: str) -> float:
    """ROUGE-L with beta 1 (Lin 2004): twice the longest common subsequence over both lengths.

    Of lower-case words without punctuation; Chinese and Japanese count by character.
    """
    from rapidfuzz.distance import Indel

    wanted, said = _ROUGE_WORD.findall(answer.lower()), _ROUGE_WORD.findall(text.lower())
    return Indel.normalized_similarity(wanted, said) if wanted or said else 0.0


def f1(answer: str, text: str) -> float:
    """SQuAD's: lower case, no punctuation, no articles (Rajpurkar et al. 2016)."""
    wanted, said = _squad_words(answer), _squad_words(text)
    common = (Counter(wanted) & Counter(said)).total()
    return 2 * common / (len(wanted) + len(said)) if common else float(wanted == said)


def choice(answer: str, text: str) -> float:
    if answer in LETTERS:
        return float(chosen_letter(text) == answer)
    return float(_squad_words(answer) == _squad_words(_first_lines(text, 1)))


def code(answer: str, text: str) -> float:
    from rapidfuzz import fuzz

    lines = [line for line in text.splitlines() if line.strip()]
    first = next((line for line in lines if not line.lstrip().startswith(_COMMENT)), "")
    return fuzz.ratio(answer.strip(), first.strip()) / 100


def number(answer: str, text: str) -> float:
    wanted, said = _NUMBER.search(answer), _NUMBER.findall(text)
    return said.count(wanted[0]) / len(said) if wanted and said else 0.0


METRICS: dict[Match, Metric] = {
    "exact": exact,
    "contains": contains,
    "contains-all": contains,
    "rouge": rouge,
    "f1": f1,
    "choice": choice,
    "code": code,
    "number": number,
}


def chosen_letter(text: str) -> str | None:
    """The letter of `The answer is (B)`, `**B**` or `C. because ...`; None without one."""
    text = text.replace("*", "").strip()
    said = _SAID_LETTER.findall(text)
    lone = _LONE_LETTER.match(text)
    return said[-1] if said else lone[1] if lone else None


def _squad_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _one_space(text: str) -> str:
    return " ".join(text.split())


def _first_lines(text: str, n: int) -> str:
    return "\n".join(text.lstrip().split("\n")[:n])
