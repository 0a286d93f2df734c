"""`python -m vllm_kvcompress.bench.quality`."""

from vllm_kvcompress.bench.quality.command import app

if __name__ == "__main__":
    app()
