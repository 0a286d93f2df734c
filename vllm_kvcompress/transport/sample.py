"""A model's own KV cache over some text, by transformers on the CPU: what profiles are made of."""

from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from vllm_kvcompress.presets import read_text
from vllm_kvcompress.transport.codec import DTYPES, as_bits


class Sample(NamedTuple):
    kv: np.ndarray  # [layers, 2, tokens, heads * head size], bits of dtype (see codec.py)
    heads: int
    dtype: str


class CannotSample(ValueError):
    """The model or the text does not serve; the message says why, in one line."""


def sample(
    model: str, prompt_file: Path | None = None, tokens: int = 2048, dtype: str = "bfloat16"
) -> Sample:
    """Run `model` over the file's text, or over made-up stories, and take its KV cache.

    `dtype` is the cache's; the model itself runs in its own. Raises CannotSample, or
    ValueError where the file cannot be read.
    """
    if dtype not in DTYPES:
        raise CannotSample(f"dtype {dtype}: must be one of {', '.join(DTYPES)}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    except (OSError, ValueError) as error:
        raise CannotSample(f"model {model}: {str(error).strip().splitlines()[0]}") from None
    text = read_text(prompt_file) if prompt_file else _stories(tokens)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < 2:
        raise CannotSample("the text has less than two tokens")
    with torch.inference_mode():
        cache = network(ids, use_cache=True, logits_to_keep=1).past_key_values
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    if len({k.shape for k, v in layers} | {v.shape for k, v in layers}) != 1:
        raise CannotSample(f"model {model}: its layers' caches differ in shape")
    stacked = torch.stack([torch.stack(pair) for pair in layers])[:, :, 0]  # [L, 2, H, n, D]
    depth, two, heads, n, size = stacked.shape
    values = stacked.float().permute(0, 1, 3, 2, 4).reshape(depth, two, n, heads * size).numpy()
    return Sample(as_bits(values, dtype), heads, dtype)


def _stories(tokens: int) -> str:
    from vllm_kvcompress.bench.demo_model.language import many_facts_task

    rng, text = Random(0), ""
    while len(text) < 8 * tokens:  # more characters than any tokenizer makes tokens of
        text += many_facts_task(rng, 1024, 16).prompt + "\n"
    return text
