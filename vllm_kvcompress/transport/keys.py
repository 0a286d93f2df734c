"""What a chunk is called: a hash of all tokens up to its end and of all that shaped its KV cache.

vLLM's own block hashes may differ between processes, so these are separate.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SHARED = "shared"


def root_digest(shaped_by: Mapping[str, Any]) -> bytes:
    """The hash that a request's chain begins with: model, dtype, adapter, media, salt..."""
    text = json.dumps(shaped_by, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).digest()


def chunk_digests(root: bytes, token_ids: Sequence[int], chunk_tokens: int) -> list[str]:
    """One per full chunk; each covers everything before it."""
    tokens = np.asarray(token_ids, "<i8")
    digests, last = [], root
    for start in range(0, len(tokens) - chunk_tokens + 1, chunk_tokens):
        chunk = tokens[start : start + chunk_tokens].tobytes()
        last = hashlib.sha256(last + chunk).digest()
        digests.append(last.hex())
    return digests


def namespace(cache_salt: str | None) -> str:
    """Each tenant (`cache_salt`) has a namespace of its own."""
    if not cache_salt:
        return SHARED
    return "t-" + hashlib.sha256(cache_salt.encode()).hexdigest()[:32]


def store_key(space: str, digest: str, rank: int, ranks: int, level: int) -> str:
    return f"{space}/{digest}-{rank}-{ranks}-{level}"
