"""vLLM's attention backends with per-head compression; imported where the platform has them."""
