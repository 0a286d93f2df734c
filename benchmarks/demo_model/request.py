"""A long prompt for the demo server as a JSON file, and how to send it: what `make serve` prints.

python -m vllm_kvcompress.bench.demo_model.request --port 8000 --model demo
"""

import argparse
import json
import os
import shlex
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from random import Random

from vllm_kvcompress.bench.demo_model.language import Task, needle_task

PROMPT_TOKENS = 3000
FACT_DEPTH = 0.35
ANSWER_TOKENS = 16


def demo_task() -> Task:
    """A question about one fact, far back in a long text; the same at every call."""
    return needle_task(Random(32), PROMPT_TOKENS, FACT_DEPTH)


def demo_request(model: str) -> dict:
    """The body of a chat completion request."""
    message = {"role": "user", "content": demo_task().prompt}
    return {
        "model": model,
        "messages": [message],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
    }


def examples(port: int, path: Path) -> str:
    """Two ways to send the request in `path`, each to be pasted into a shell as it is."""
    question = demo_task().prompt.rsplit(". ", 1)[-1]
    server = f"http://localhost:{port}"
    body = shlex.quote(f"@{path}")
    return f"""
A prompt of {PROMPT_TOKENS} tokens, whose end asks: {question}
The right answer is: {demo_task().answer}
Paste either into another terminal, once the server is up:

curl -s {server}/v1/chat/completions -H 'Content-Type: application/json' -d {body}

{shlex.quote(sys.executable)} - <<'END'
import json
from openai import OpenAI
client = OpenAI(base_url="{server}/v1", api_key="none")
request = json.load(open({str(path)!r}))
print(client.chat.completions.create(**request).choices[0].message.content)
END
"""


def wait_until_ready(port: int) -> bool:
    """Wait for the server; False when the process that started this one is gone before."""
    parent = os.getppid()
    while os.getppid() == parent:
        try:
            with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", default="demo", help="the name the server serves it under")
    parser.add_argument("--out", type=Path, default=Path("build/demo-request.json"))
    parser.add_argument("--when-ready", action="store_true", help="wait for the server, then print")
    arguments = parser.parse_args()
    path = arguments.out.resolve()
    if arguments.when_ready and not wait_until_ready(arguments.port):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(demo_request(arguments.model)) + "\n")
    print(examples(arguments.port, path), flush=True)


if __name__ == "__main__":
    main()
