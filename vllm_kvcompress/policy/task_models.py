"""Any other task classifier: a sequence classifier that transformers loads, BERT-style."""

import time
from functools import cache
from typing import Protocol, cast

import torch

from vllm_kvcompress.policy.tasks import shipped_classifier
from vllm_kvcompress.presets import TASKS, Task, shorten

MAX_TOKENS = 512  # of the classifier's own, special ones included


class Classifier(Protocol):
    def classify(self, text: str) -> Task:
        """The task class of a prompt, or of its beginning and end."""


@cache
def task_classifier(name: str | None) -> Classifier:
    """The shipped classifier, or the model of that Hugging Face id or folder; loaded once.

    Raises:
        ValueError: no such model, or not one that tells the two classes; one line.
    """
    return shipped_classifier() if name is None else SequenceClassifier(name)


class SequenceClassifier:
    """A model for sequence classification whose labels are the task classes.

    Of a long prompt it reads the first and the last tokens, half of `MAX_TOKENS` each
    (WindowKV, arXiv 2503.17922). Weights come from safetensors, code from transformers only.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        who = f"task_classifier={shorten(name)}"
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            labels = [str(config.id2label[i]).lower() for i in range(config.num_labels)]
            if sorted(labels) != sorted(TASKS):
                raise ValueError(
                    f"it has the labels {shorten(labels)}, but {' and '.join(TASKS)} are wanted "
                    "(id2label of its config.json)"
                )
            self._tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self._model = AutoModelForSequenceClassification.from_pretrained(
                name, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
            ).eval()
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{who} cannot be used: {reason[:400]}") from None
        self._labels = cast(list[Task], labels)
        positions = getattr(config, "max_position_embeddings", MAX_TOKENS)
        self._max_tokens = min(MAX_TOKENS, positions, self._tokenizer.model_max_length)

    @torch.inference_mode()
    def classify(self, text: str) -> Task:
        encoded = self._tokenizer(
            self._ends(text), truncation=True, max_length=self._max_tokens, return_tensors="pt"
        )
        return self._labels[int(self._model(**encoded).logits[0].argmax())]

    def _ends(self, text: str) -> str:
        """The text, or its first and last tokens."""
        spans = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = spans["offset_mapping"]
        room = self._max_tokens - self._tokenizer.num_special_tokens_to_add()
        if len(spans) <= room:
            return text
        return f"{text[: spans[room // 2 - 1][1]]} {text[spans[-(room // 2)][0] :]}"

    def seconds(self) -> float:
        """How long a prompt of the largest size takes here."""
        text = "word " * MAX_TOKENS
        self.classify(text)
        began = time.perf_counter()
        self.classify(text)
        return time.perf_counter() - began
