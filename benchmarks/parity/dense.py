"""A model of transformers whose every (layer, KV head) attends to the prompt tokens it kept."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

from vllm_kvcompress.bench.parity.methods import Method

ATTENTION = "kv_compress_dense"


class Dense:
    """Greedy answers to a prompt that was read in full and then kept in part.

    Layers above a method's `tsp_layer` see only what that layer selected.
    """

    def __init__(self, folder: str | Path) -> None:
        AttentionInterface.register(ATTENTION, self._attend)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._model.set_attn_implementation(ATTENTION)
        self.layers: int = self._model.config.num_hidden_layers

    @torch.inference_mode()
    def answer(self, prompt: list[int], method: Method, draft: list[int], most: int) -> list[int]:
        """At most `most` tokens, up to the end token.

        Args:
            draft: what the answer may be; the nearer, the fewer passes. It decides nothing.
        """
        self._method, self._kept = method, None
        self._paid: list[Tensor] = []
        self._seen: list[Tensor] = [torch.arange(len(prompt))]
        ids = torch.tensor([prompt])
        first = self._model(ids, past_key_values=DynamicCache(), use_cache=True)
        self._kept = method.kept(self._paid, self._seen[: self.layers], len(prompt))
        said = [int(first.logits[0, -1].argmax())]
        end = self._model.config.eos_token_id
        while len(said) < most and said[-1] != end:
            guess = said + draft[len(said) : most - 1]
            cache = deepcopy(first.past_key_values)
            logits = self._model(torch.tensor([guess]), past_key_values=cache).logits[0]
            for place in range(len(said) - 1, len(guess)):
                said.append(int(logits[place].argmax()))
                followed = guess[place + 1 : place + 2] in ([], said[-1:])
                if not followed or said[-1] == end or len(said) == most:
                    break
        return said

    def _attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _mask: Any,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """`query [1, Hq, T, D]` over `key, value [1, H, n + T, D]`."""
        layer, heads, total = module.layer_idx, *key.shape[1:3]
        grouped = query[0].unflatten(0, (heads, -1))  # [H, G, T, D]
        logits = grouped @ key[0][:, None].transpose(-1, -2) * scaling
        new = query.shape[2]
        row = torch.arange(total - new, total)[:, None]
        hidden = (torch.arange(total) > row).expand(heads, new, total).clone()
        if self._kept is None:
            unseen = torch.ones(total, dtype=torch.bool)
            unseen[self._seen[layer]] = False
            hidden |= unseen & (torch.arange(total) != row)  # rows that nobody reads see themselves
        else:
            hidden[..., : total - new] |= ~self._kept[layer][:, None]
        attention = logits.masked_fill(hidden[:, None], -torch.inf).softmax(dim=-1)
        if self._kept is None:
            self._note(layer, attention)
        out = attention @ value[0][:, None]
        return out.flatten(0, 1).transpose(0, 1)[None], None

    def _note(self, layer: int, attention: Tensor) -> None:
        """What the window pays to what this layer saw, and what the next one sees."""
        seen = self._seen[layer]
        paid = attention[:, :, -self._method.window_tokens :, seen]
        self._paid.append(paid)
        goes_on = layer == self._method.tsp_layer
        self._seen.append(self._method.propagated(paid) if goes_on else seen)
