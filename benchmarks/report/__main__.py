"""`python -m vllm_kvcompress.bench.report`."""

from vllm_kvcompress.bench.report.command import app

if __name__ == "__main__":
    app()
