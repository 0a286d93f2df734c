"""The bench: the demo model, workloads and measurements (installs as vllm_kvcompress.bench)."""
