"""HOW a KV cache travels: codec, container, stores, stream policy, connector (CacheGen)."""
