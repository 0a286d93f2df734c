"""A model's queries and keys, layer by layer, as policies see them: read with transformers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.policy import Observation

ATTENTION = "kv_compress_reading"


class Reader:
    """Any decoder-only model of transformers whose attention can be replaced.

    Raises:
        BenchError: the model cannot be loaded.
    """

    def __init__(self, model: str, dtype: str) -> None:
        AttentionInterface.register(ATTENTION, self._attend)
        self._seen: dict[int, Observation] = {}
        self._window = 1
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
            loaded.set_attn_implementation(ATTENTION)
        except (OSError, ValueError) as error:
            raise BenchError(f"cannot load {model!r}: {str(error).splitlines()[0]}") from None
        self._model: Any = loaded.eval().to(device)

    @torch.inference_mode()
    def read(self, token_ids: tuple[int, ...], window: int) -> list[Observation]:
        """What each layer's last `window` queries and its keys are for a prompt."""
        self._seen, self._window = {}, min(window, len(token_ids))
        ids = torch.tensor([token_ids], device=self._model.device)
        self._model(ids, use_cache=False, logits_to_keep=1)
        return [self._seen[layer] for layer in sorted(self._seen)]

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
        """Causal attention of `query [1, Hq, n, D]` to `key, value [1, H, n, D]`, noted down."""
        heads, n = key.shape[1:3]
        positions = torch.arange(n, device=key.device)
        last = query[0, :, -self._window :].unflatten(0, (heads, -1))  # [H, G, w, D]
        self._seen[module.layer_idx] = Observation(
            queries=last.permute(2, 0, 1, 3),
            query_positions=positions[-self._window :],
            keys=key[0],
            values=value[0],
            positions=positions,
            valid=None,
            scale=scaling,
        )
        out = F.scaled_dot_product_attention(
            query, key, value, scale=scaling, is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2), None
