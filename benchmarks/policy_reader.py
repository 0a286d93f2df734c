"""The demo model: a prompt read once with its full cache, then answered from parts of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vllm_kvcompress.bench.demo_model.language import Task


@dataclass(frozen=True)
class Reading:
    """A prompt as the model has read it: logits of its end, and per layer queries, keys, values.

    queries `[n, H, G, D]`, keys and values `[H, n, D]`, all after RoPE where it applies.
    """

    last_logits: Tensor
    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]


class Reader:
    """The demo model, run layer by layer so that every head can see tokens of its own."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        shape = self.model.config
        self.layers = shape.num_hidden_layers
        self.heads, self.size = shape.num_key_value_heads, shape.head_dim
        self.group = shape.num_attention_heads // self.heads
        self.scale = self.size**-0.5

    def encode(self, task: Task) -> tuple[Tensor, Tensor]:
        """Token ids of prompt `[n]` and answer `[a]`."""
        if task.form == "chat":
            turn = [{"role": "user", "content": task.prompt}]
            text = self.tokenizer.apply_chat_template(
                turn, tokenize=False, add_generation_prompt=True
            )
        else:
            text = self.tokenizer.bos_token + task.prompt
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        answer = self.tokenizer(" " + task.answer, add_special_tokens=False).input_ids
        return torch.tensor(ids), torch.tensor(answer)

    def read(self, ids: Tensor) -> Reading:
        """Read a prompt `[n]` with the full cache."""
        queries, keys, values = [], [], []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            queries.append(q[0].permute(2, 0, 1, 3))
            keys.append(k[0])
            values.append(v[0])
            many = (k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1))
            return F.scaled_dot_product_attention(q.flatten(1, 2), *many, is_causal=True)

        logits = self._forward(ids.unsqueeze(0), torch.arange(len(ids)), attend)
        return Reading(logits[0, -1], queries, keys, values)

    def answers_right(self, reading: Reading, answer: Tensor, seen: Tensor) -> Tensor:
        """Which of C caches yield the answer; bool `[C]`.

        Args:
            answer: ids `[a]`.
            seen: bool `[C, L, H, n]`, the prompt tokens that each (layer, KV head) still holds.
        """
        count, n, a = len(seen), seen.shape[-1], len(answer)
        if reading.last_logits.argmax() != answer[0]:
            return torch.zeros(count, dtype=torch.bool)
        if a == 1:
            return torch.ones(count, dtype=torch.bool)
        future = torch.ones(a - 1, a - 1, dtype=torch.bool).triu(1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = q.permute(1, 0, 2, 3, 4).flatten(1, 3)  # [H, C*G*a, D]
            old = torch.bmm(rows, reading.keys[layer].transpose(1, 2))
            old = old.view(self.heads, count, self.group * (a - 1), n)
            gone = ~seen[:, layer].transpose(0, 1).unsqueeze(2)  # [H, C, 1, n]
            old.masked_fill_(gone, -torch.inf)
            new = (q @ k.transpose(-1, -2).unsqueeze(2)).masked_fill_(future, -torch.inf)
            new = new.permute(1, 0, 2, 3, 4).reshape(self.heads, count, -1, a - 1)
            paid = torch.cat([old, new], dim=-1).mul_(self.scale).softmax(dim=-1)
            out = torch.bmm(paid[..., :n].flatten(1, 2), reading.values[layer])
            out = out.view(self.heads, count, -1, self.size)
            out += paid[..., n:] @ v.transpose(0, 1)
            out = out.view(self.heads, count, self.group, a - 1, self.size)
            return out.permute(1, 0, 2, 3, 4).flatten(1, 2)

        ids = answer[:-1].expand(count, a - 1)
        logits = self._forward(ids, torch.arange(n, n + a - 1), attend)
        return (logits.argmax(dim=-1) == answer[1:]).all(dim=-1)

    @torch.inference_mode()
    def _forward(
        self,
        ids: Tensor,
        positions: Tensor,
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Logits `[C, t, vocabulary]`.

        `attend(layer, q [C, H, G, t, D], k [C, H, t, D], v [C, H, t, D]) -> [C, H*G, t, D]`.
        """
        core = self.model.model
        hidden = core.embed_tokens(ids)
        cos, sin = core.rotary_emb(hidden, positions.unsqueeze(0))
        for number, layer in enumerate(core.layers):
            normed = layer.input_layernorm(hidden)
            split = (*normed.shape[:2], -1, self.size)
            attention = layer.self_attn
            q = attention.q_proj(normed).view(split).transpose(1, 2)
            k = attention.k_proj(normed).view(split).transpose(1, 2)
            v = attention.v_proj(normed).view(split).transpose(1, 2)
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            grouped = q.reshape(len(ids), self.heads, self.group, -1, self.size)
            out = attend(number, grouped, k, v).transpose(1, 2).flatten(2)
            hidden = hidden + attention.o_proj(out)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(core.norm(hidden))
