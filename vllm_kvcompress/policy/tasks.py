"""Which class of task a prompt is: WindowKV judges the two differently (arXiv 2503.17922).

A linear model over words and pairs of words, trained by `tools/train_task_classifier.py` on
prompts that the project makes, and shipped as JSON. English only: a prompt without a known word
gets the class of the bias.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import pairwise

import numpy as np

from vllm_kvcompress.presets import Task

PARAGRAPH_WORDS = 40
WEIGHTS = "task_classifier.json"
_WORD = re.compile(r"[a-z]+|[?]")
_ROLES = {"assistant", "user", "system", "model"}  # what chat templates leave at the ends


def features(text: str) -> set[str]:
    """Words and pairs of words of what is asked.

    People ask in short paragraphs, before a text or after it: those of the first two and the
    last two that have at most `PARAGRAPH_WORDS` words. Without any, the text's ends count.
    """
    paragraphs = [_WORD.findall(part) for part in re.split(r"\n\s*\n", text.lower())]
    paragraphs = [words for words in paragraphs if set(words) - _ROLES] or [[]]
    outer = [*paragraphs[:2], *paragraphs[2:][-2:]]
    short = [words for words in outer if len(words) <= PARAGRAPH_WORDS]
    found: set[str] = set()
    for part in short or [paragraphs[0][:PARAGRAPH_WORDS], paragraphs[-1][-PARAGRAPH_WORDS:]]:
        found.update(part)
        found.update(f"{a} {b}" for a, b in pairwise(part))
    return found


@dataclass(frozen=True)
class TaskClassifier:
    """Positive scores are localization; `index` maps a feature to its place in `weights [F]`."""

    index: dict[str, int]
    weights: np.ndarray
    bias: float

    def score(self, text: str) -> float:
        """Log-odds of localization against aggregation."""
        known = [self.index[feature] for feature in features(text) if feature in self.index]
        return float(self.weights[known].sum()) + self.bias

    def classify(self, text: str) -> Task:
        """The task class of a prompt, or of its first and last 256 tokens; under a millisecond."""
        return "localization" if self.score(text) > 0 else "aggregation"


@cache
def shipped_classifier() -> TaskClassifier:
    data = json.loads(resources.files(__package__).joinpath(WEIGHTS).read_text())
    weights: dict[str, float] = data["weights"]
    index = {feature: i for i, feature in enumerate(weights)}
    return TaskClassifier(index, np.array(list(weights.values())), data["bias"])
