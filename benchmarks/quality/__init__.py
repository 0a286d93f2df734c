"""Quality: what a model still answers right when its cache is compressed."""
