"""NVIDIA kvpress, asked in lines of JSON: the answering side, run by path in its own environment.

The first line opens a model, `{"model", "dtype", "threads"}`; every later one is a case:

    {"id", "prompt_ids", "max_tokens", "press", "press_args", "kept_tokens", "question_tokens"}

answered by `{"id", "token_ids", "text", "kept_tokens"}` or `{"id", "error"}`. `press_args` hold
plain values or, for a press inside a press, `{"press", "press_args"}`. `{"id", "check": {"press",
"press_args"}}` only makes the press.

A prompt is prefilled whole with its full cache, which gives the first token; the press then cuts
the cache down, and the rest is decoded greedily at the tokens' true positions. With
`question_tokens` the prompt up to its question is prefilled and compressed, and the question is
read over what was kept.
"""

import copy
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ABSTRACT = {"BasePress", "ScorerPress"}
REPLAY_BYTES = 4 * 2**30
PACKAGES = ("kvpress", "transformers", "torch")


class LayerCall(NamedTuple):
    """What an attention layer was called with in a prefill, and what came out."""

    module: Any
    args: Any
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class Prefill:
    """A prompt's full cache and last logits `[V]`; `calls` is empty when it was too big to keep."""

    ids: tuple[int, ...]
    logits: Any
    cache: Any
    calls: Sequence[LayerCall]


class Compressed(NamedTuple):
    """A cache after a press, the tokens held in it per head on average, and what it masks.

    Presses whose heads keep different numbers of tokens cut nothing off: kvpress masks, per layer,
    the keys at `masked` and leaves them where they are.
    """

    cache: Any
    held: float
    masked: Sequence[Any]


class Reader:
    """A model that answers prompts through kvpress.

    Args:
        model: a folder or Hugging Face id.
        dtype: a torch dtype's name, or `auto`.
        threads: of torch.
    """

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        import kvpress
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(threads)
        self._torch, self._kvpress = torch, kvpress
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=wanted)
        self.model = loaded.eval().to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._layers = _attention_layers(self.model)
        self._stops = _stop_ids(self.model, self.tokenizer)
        self._presses: dict[str, Any] = {}
        self._latest: Prefill | None = None

    @property
    def known_presses(self) -> list[str]:
        return sorted(set(self._press_classes()) - ABSTRACT)

    def answer(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        press: str,
        press_args: Mapping[str, Any],
        kept_tokens: int,
        question_tokens: int = 0,
    ) -> dict[str, Any]:
        """The greedy continuation of a prompt over its compressed cache.

        Raises:
            ValueError: the press is not known, or cannot keep so few tokens.
        """
        chosen = self.press(press, press_args)
        context = prompt_ids[: len(prompt_ids) - question_tokens]
        question = prompt_ids[len(context) :]
        with self._torch.inference_mode():
            prefill = self._prefill(tuple(context))
            done = self._compress(prefill, chosen, kept_tokens)
            self._mask(done.masked)
            position = self._first_position(chosen, done.cache, len(context))
            logits = prefill.logits
            if question:
                logits = self._read(done, question, position)
            token_ids = self._decode(done.cache, logits, position + len(question), max_tokens)
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return {"token_ids": token_ids, "text": text, "kept_tokens": done.held}

    def press(self, press: str, press_args: Mapping[str, Any]) -> Any:
        """The press of that name, made once for the same arguments.

        Raises:
            ValueError: it is not one of kvpress's, or does not take these arguments.
        """
        key = json.dumps([press, press_args], sort_keys=True)
        if key not in self._presses:
            self._presses[key] = self._build(press, press_args)
        return self._presses[key]

    def _build(self, name: str, arguments: Mapping[str, Any]) -> Any:
        if name in ABSTRACT or name not in self._press_classes():
            known = ", ".join(self.known_presses)
            raise ValueError(f"kvpress has no press {name!r}; it knows {known}")
        built = {
            key: self._build(value["press"], value["press_args"])
            if isinstance(value, Mapping)
            else value
            for key, value in arguments.items()
        }
        try:
            return self._press_classes()[name](**built)
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"{name} cannot be made: {_why(error)}") from None

    def _press_classes(self) -> dict[str, type]:
        exported = {name: getattr(self._kvpress, name) for name in self._kvpress.__all__}
        base = self._kvpress.BasePress
        return {
            name: found
            for name, found in exported.items()
            if isinstance(found, type) and issubclass(found, base)
        }

    def _prefill(self, ids: tuple[int, ...]) -> Prefill:
        """The last prompt's prefill is kept: cases of the same prompt come one after another."""
        if self._latest is None or self._latest.ids != ids:
            self._latest = None
            self._latest = self._run(ids)
        return self._latest

    def _run(self, ids: tuple[int, ...]) -> Prefill:
        from transformers import DynamicCache

        calls: list[LayerCall] = []
        size = len(ids) * len(self._layers) * self.model.config.get_text_config().hidden_size
        hooks = []
        if size * self.model.dtype.itemsize <= REPLAY_BYTES:
            hooks = [
                layer.register_forward_hook(
                    lambda *call: calls.append(LayerCall(*call)), with_kwargs=True
                )
                for layer in self._layers
            ]
        cache = DynamicCache(config=self.model.config)
        try:
            logits = self._forward(cache, ids, 0)
        finally:
            for hook in hooks:
                hook.remove()
        return Prefill(ids, logits, cache, calls)

    def _compress(self, prefill: Prefill, press: Any, kept_tokens: int) -> Compressed:
        tokens = len(prefill.ids)
        nothing = [None] * len(self._layers)
        if kept_tokens >= tokens:
            return Compressed(copy.deepcopy(prefill.cache), float(tokens), nothing)

        def attempt(target: int) -> Compressed:
            # A quarter more: what presses cut off or round then is `target`.
            press.compression_ratio = 1 - (target + 0.25) / tokens
            self._mask(nothing)
            self._torch.manual_seed(hash(prefill.ids) % 2**32)  # some presses draw at random
            cache = self._apply(prefill, press)
            masked = [getattr(layer, "masked_key_indices", None) for layer in self._layers]
            return Compressed(cache, held_tokens(cache, masked), masked)

        return closest(attempt, kept_tokens, tokens)

    def _apply(self, prefill: Prefill, press: Any) -> Any:
        """The cache as `press` leaves it."""
        if type(press).__call__ is self._kvpress.BasePress.__call__ and prefill.calls:
            cache = self._replay(prefill, press)
            if cache is not None:
                return cache
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        with press(self.model):
            self._forward(cache, prefill.ids, 0)
        return cache

    def _replay(self, prefill: Prefill, press: Any) -> Any | None:
        """The press's own hooks on the recorded prefill; None when they change its outputs.

        A hook runs after its layer and sees what the layer was called with, so that it does the
        same here as in a prefill of its own.
        """
        cache = copy.deepcopy(prefill.cache)
        with press(self.model):
            for module, args, kwargs, output in prefill.calls:
                for hook in module._forward_hooks.values():
                    seen = hook(module, args, {**kwargs, "past_key_values": cache}, output)
                    if seen is not None and seen is not output:
                        return None
        return cache

    def _mask(self, masked: Sequence[Any]) -> None:
        for layer, indices in zip(self._layers, masked, strict=True):
            layer.masked_key_indices = indices

    def _first_position(self, press: Any, cache: Any, tokens: int) -> int:
        """Of the token after the context; presses that rotate keys anew close the gaps."""
        rotates = isinstance(press, self._kvpress.KeyRerotationPress)
        return cache.get_seq_length() if rotates else tokens

    def _read(self, done: Compressed, ids: Sequence[int], position: int) -> Any:
        """Logits after `ids`; one by one where layers or heads hold different numbers of tokens."""
        even = len({layer.keys.shape[2] for layer in done.cache.layers}) == 1
        if even and not any(done.masked):
            return self._forward(done.cache, ids, position)
        for offset, token in enumerate(ids):
            logits = self._forward(done.cache, [token], position + offset)
        return logits

    def _decode(self, cache: Any, logits: Any, position: int, max_tokens: int) -> list[int]:
        tokens = [int(logits.argmax())]
        while len(tokens) < max_tokens and tokens[-1] not in self._stops:
            logits = self._forward(cache, tokens[-1:], position + len(tokens) - 1)
            tokens.append(int(logits.argmax()))
        return tokens

    def _forward(self, cache: Any, ids: Sequence[int], position: int) -> Any:
        """Logits `[V]` after the last of `ids`, which stand at `position` and on."""
        row = self._torch.tensor([list(ids)], device=self.device)
        positions = self._torch.arange(position, position + len(ids), device=self.device)
        output = self.model(
            input_ids=row,
            position_ids=positions[None],
            past_key_values=cache,
            logits_to_keep=1,
        )
        return output.logits[0, -1]


def held_tokens(cache: Any, masked: Sequence[Any]) -> float:
    """Tokens per head, on average over layers: those in the cache less those that are masked."""
    held = []
    for layer, indices in zip(cache.layers, masked, strict=True):
        _, heads, tokens, _ = layer.keys.shape
        held.append(tokens - (len(indices[0]) / heads if indices is not None else 0))
    return sum(held) / len(held)


def closest(attempt: Callable[[int], Compressed], kept_tokens: int, tokens: int) -> Compressed:
    """The attempt that holds the most, but not more than `kept_tokens` of `tokens`.

    Presses cut to chunks, to layers, or to a float's rounding: where the first target misses,
    growing steps find one on the other side, and halving what lies between finds the nearest.

    Raises:
        ValueError: every attempt holds more.
    """
    best: Compressed | None = None
    low, high, target, step = 1, tokens - 1, kept_tokens, 0
    while low <= high:
        made = attempt(target)
        over = made.held > kept_tokens
        if not over and (best is None or made.held > best.held):
            best = made
        if made.held == kept_tokens:
            break
        step = 2 * step or math.ceil(abs(made.held - kept_tokens))
        if over:
            high, reach = target - 1, target - step
        else:
            low, reach = target + 1, target + step
        both_sides = low > 1 and high < tokens - 1
        target = (low + high) // 2 if both_sides else min(max(reach, low), high)
    if best is None:
        raise ValueError(
            f"it holds {made.held:g} of {tokens} tokens at any ratio; {kept_tokens} were asked for"
        )
    return best


def _attention_layers(model: Any) -> list[Any]:
    inner = getattr(model.model, "language_model", model.model)
    return [layer.self_attn for layer in inner.layers]


def _stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Where vLLM stops: the tokenizer's end token and those of generation_config.json."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}


def _why(error: BaseException) -> str:
    """One line; a bare assert says where it stands."""
    if text := str(error).strip():
        return " ".join(text.split())
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}: {last.line}"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(answer: Mapping[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    reader = Reader(**json.loads(sys.stdin.readline()))
    versions = {name: version(name) for name in PACKAGES}
    say({"presses": reader.known_presses, "versions": versions, "device": reader.device})
    for line in sys.stdin:
        case = json.loads(line)
        number = case.pop("id")
        try:
            if "check" in case:
                reader.press(**case["check"])
                say({"id": number})
            else:
                say({"id": number, **reader.answer(**case)})
        except Exception as error:
            traceback.print_exc()
            say({"id": number, "error": _why(error)})


if __name__ == "__main__":
    main()
