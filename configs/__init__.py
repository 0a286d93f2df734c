"""Presets: one YAML file each, read by `vllm_kvcompress.config`."""
