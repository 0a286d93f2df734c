"""Where chunks are kept: a local directory, Redis or Valkey, S3 and other object stores."""

from vllm_kvcompress.transport.stores.interface import Store, StoreError, checked_key
from vllm_kvcompress.transport.stores.open import open_store

__all__ = ["Store", "StoreError", "checked_key", "open_store"]
