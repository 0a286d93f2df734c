"""Stands in for `vllm`: a server that only counts, and a client that only asks it to.

FAKE_VLLM: what the server of plain vLLM, fp8 or kv-compress does wrong, as `fp8:refuse`.
"""

import json
import os
import sys
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def value(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


def kind(arguments: list[str]) -> str:
    if "--kv-cache-dtype" in arguments:
        return "fp8"
    return "ours" if "--kv-compress" in arguments else "plain"


class Server(BaseHTTPRequestHandler):
    kind = "plain"
    mishap = ""
    stats: dict[str, Any]

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.reply(200, {"data": [{"id": "served", "root": "its-folder"}]})
        elif self.path == "/v1/kv_compress/stats" and self.kind == "ours":
            self.reply(200, self.stats)
        else:
            self.reply(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.mishap == "die":
            print("RuntimeError: the engine core is gone", flush=True)
            os._exit(1)
        rate = asked["asks"].get("kv_compress_rate")
        outcomes = self.stats["requests"].setdefault("kv-compress", {})
        key = "compressed" if rate else "off"
        outcomes[key] = outcomes.get(key, 0) + asked["prompts"]
        if rate:
            tokens = asked["prompts"] * asked["prompt_tokens"]
            for name, count in (("prompt_tokens", tokens), ("held_tokens", tokens / rate)):
                self.stats[name]["kv-compress"] = self.stats[name].get("kv-compress", 0) + count
            self.stats["blocks_freed"] += 10 * asked["prompts"]
        speed = {"plain": 100, "fp8": 150, "ours": 100 * (rate or 1)}[self.kind]
        self.reply(200, {"speed": speed / (5 if self.mishap == "slow" else 1)})

    def reply(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def serve(arguments: list[str]) -> None:
    who = kind(arguments)
    mishaps = dict(part.split(":") for part in os.environ.get("FAKE_VLLM", "").split() if part)
    Server.kind, Server.mishap = who, mishaps.get(who, "")
    Server.stats = {"requests": {}, "prompt_tokens": {}, "held_tokens": {}, "blocks_freed": 0}
    if Server.mishap == "refuse":
        raise NotImplementedError("FP8 KV cache on CPU requires x86 with AVX-512 or AMX.")
    if Server.mishap == "hang":
        sys.stdin.read()
        while True:
            pass
    address = value(arguments, "--host"), int(value(arguments, "--port"))
    ThreadingHTTPServer(address, Server).serve_forever()


def bench(arguments: list[str]) -> None:
    body = json.loads(value(arguments, "--extra-body"))
    prompts = int(value(arguments, "--num-prompts"))
    asked = {
        "prompts": prompts,
        "prompt_tokens": int(value(arguments, "--random-input-len")),
        "asks": body.get("vllm_xargs", {}),
    }
    request = urllib.request.Request(value(arguments, "--base-url"), json.dumps(asked).encode())
    with urllib.request.urlopen(request, timeout=100) as answer:
        speed = json.load(answer)["speed"]
    result: dict[str, Any] = {
        "duration": 1.0,
        "completed": prompts,
        "request_throughput": speed / 10,
        "request_goodput": speed / 20 if "--goodput" in arguments else None,
        "output_throughput": speed / 2,
        "total_token_throughput": speed,
    }
    for name in ("ttft", "tpot", "itl", "e2el"):
        for which in ("mean", "median", "p99"):
            result[f"{which}_{name}_ms"] = 1000 / speed
    with open(
        f"{value(arguments, '--result-dir')}/{value(arguments, '--result-filename')}", "w"
    ) as f:
        json.dump(result, f)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2:])
    else:
        bench(sys.argv[3:])
