"""Per-head KV cache compression for vLLM 0.32: an extension, no fork."""

__version__ = "0.1.0"
