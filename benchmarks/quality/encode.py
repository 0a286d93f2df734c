"""Cases as token ids, alike for an engine, a server and a peer."""

from collections.abc import Sequence
from typing import Any, Protocol

from tqdm import tqdm

from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.quality.ask import Prompt
from vllm_kvcompress.bench.quality.case import MAX_NEW_TOKENS, Case


class Encoder(Protocol):
    max_model_len: int

    def chat_ids(self, prompt: str) -> list[int]:
        """One user turn under the model's chat template, ready to be answered."""
        ...

    def plain_ids(self, text: str, special: bool) -> list[int]: ...


class LocalEncoder:
    """The tokenizer of a model folder or Hugging Face id.

    Raises:
        BenchError: there is none.
    """

    def __init__(self, model: str, trust_remote_code: bool = False) -> None:
        from transformers import AutoConfig, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                model, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise BenchError(f"cannot load {model!r}: {str(error).splitlines()[0]}") from None
        text_config = config.get_text_config()
        self.max_model_len: int = text_config.max_position_embeddings

    def chat_ids(self, prompt: str) -> list[int]:
        if not self.tokenizer.chat_template:
            return self.plain_ids(prompt, special=True)
        turn = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_dict=False
        )

    def plain_ids(self, text: str, special: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=special)


def encode(case: Case, encoder: Encoder) -> Prompt:
    """The tokens of a case; its question is what follows the tokens shared with its context."""

    def ids_of(text: str) -> list[int]:
        return encoder.chat_ids(text) if case.form == "chat" else encoder.plain_ids(text, True)

    ids, question = ids_of(case.prompt), 0
    if case.question_characters and case.question_characters < len(case.prompt):
        context = ids_of(case.prompt[: -case.question_characters])
        question = len(ids) - _shared(ids, context)
    longest = case.max_tokens or max(_answer_tokens(said, encoder) for said in case.answer)
    return Prompt(tuple(ids), question, min(longest, MAX_NEW_TOKENS))


def _answer_tokens(answer: str, encoder: Encoder) -> int:
    spaced = encoder.plain_ids(" " + answer, False)
    return max(len(spaced), len(encoder.plain_ids(answer, False)))


def _shared(a: list[int], b: list[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def encoded(cases: Sequence[Case], encoder: Encoder) -> tuple[list[Case], dict[str, Prompt], int]:
    """Cases that fit into the model's context, their prompts, and the longest with its answer."""
    prompts, kept, longest = {}, [], 0
    for case in tqdm(cases, desc="tokenizing", unit="prompt", leave=False):
        prompt = encode(case, encoder)
        total = len(prompt.token_ids) + prompt.max_tokens
        if total <= encoder.max_model_len:
            prompts[case.key] = prompt
            kept.append(case)
            longest = max(longest, total)
    return kept, prompts, longest
