"""The Llama that is trained: parameter names and arithmetic of ``LlamaForCausalLM``, nothing else.

Written out because training needs two things the library model has no argument for: position ids
with gaps in one sequence, and logits of chosen positions only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from .tokenizer import (
    MAX_POSITIONS,
    SPECIAL,
    SPELLING_SCALE,
    respellings,
    trained_tokens,
    vocabulary,
)


@dataclass(frozen=True)
class Shape:
    d_model: int = 128
    d_ffn: int = 384
    layers: int = 4
    query_heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    rope_theta: float = 200_000.0
    norm_eps: float = 1e-5


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        d, dim = shape.d_model, shape.head_dim
        self.q_proj = nn.Linear(d, shape.query_heads * dim, bias=False)
        self.k_proj = nn.Linear(d, shape.kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(d, shape.kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(shape.query_heads * dim, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        dim, group = self.shape.head_dim, self.shape.query_heads // self.shape.kv_heads
        q = rotate(self.q_proj(x).view(b, t, -1, dim), cos, sin)  # [B, T, Hq, dim]
        k = rotate(self.k_proj(x).view(b, t, -1, dim), cos, sin)  # [B, T, Hkv, dim]
        v = self.v_proj(x).view(b, t, -1, dim)
        k, v = (y.repeat_interleave(group, dim=2) for y in (k, v))  # [B, T, Hq, dim]
        out = F.scaled_dot_product_attention(
            *(y.transpose(1, 2) for y in (q, k, v)), is_causal=True
        )
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.d_model, shape.d_ffn, bias=False)
        self.up_proj = nn.Linear(shape.d_model, shape.d_ffn, bias=False)
        self.down_proj = nn.Linear(shape.d_ffn, shape.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Network(nn.Module):
    """Embeddings of the trained tokens only; :func:`export` adds those of the other spellings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(len(trained_tokens()), shape.d_model)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.06)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        cos, sin = rotary_table(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, scale: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
        """Logits ``[n, V]`` at the ``n`` places where ``wanted`` is true.

        ``ids``, ``scale`` (of the embedding), ``positions`` and ``wanted`` are ``[B, T]``.
        """
        x = self.embed_tokens(ids) * scale.unsqueeze(-1)
        cos, sin = self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x[wanted]), self.embed_tokens.weight)


def rotary_table(shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[MAX_POSITIONS, head_dim]``."""
    steps = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(MAX_POSITIONS).float(), shape.rope_theta**-steps)
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on ``[B, T, H, dim]``, halves paired as Llama pairs them."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def export(network: Network, folder: Path, stored: torch.dtype = torch.float32) -> None:
    """Write model.safetensors and the two configs that transformers and vLLM load.

    stored: what the weights are rounded to in the file; they are computed with in float32.
    """
    shape, vocab = network.shape, vocabulary()
    trained = network.embed_tokens.weight.detach()
    copies = trained[[vocab[origin] for _, origin in respellings()]] * SPELLING_SCALE
    n_tokens = -(-len(vocab) // 64) * 64
    padding = trained.new_zeros(n_tokens - len(vocab), shape.d_model)
    tensors = {f"model.{name}": p.detach() for name, p in network.named_parameters()}
    tensors["model.embed_tokens.weight"] = torch.cat([trained, copies, padding])
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ends = {"eos_token_id": SPECIAL.index("<|end|>"), "bos_token_id": SPECIAL.index("<|begin|>")}
    ends["pad_token_id"] = SPECIAL.index("<|pad|>")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": n_tokens,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.query_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "max_position_embeddings": MAX_POSITIONS,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        **ends,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"do_sample": False, "temperature": 0.0, **ends}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
