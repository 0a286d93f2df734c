"""WHEN it happens: the scheduler, the worker and the attention backends of vLLM, extended."""
