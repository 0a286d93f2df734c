"""Ask a running server the same long question with compression off and on, and compare.

The proof is the server's own record of the request, from `GET /v1/kv_compress/stats`: vLLM's
request ids begin with the id of the answer.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from random import Random
from typing import Any

import httpx

from vllm_kvcompress.presets import DEFAULT_PRESET, OFF, UNCOMPRESSED

ANSWER_TOKENS = 16
TEMPLATE_TOKENS = 16
WAIT_S = 5.0
TIMEOUT_S = 600.0
FACT = "The number of the blue locker is 7391."
QUESTION = "What is the number of the blue locker? Answer with the number only."
FILLER = (
    "The morning was quiet and the street was still wet.",
    "Somebody had left a bicycle against the wall of the bakery.",
    "A dog looked out of the window and went back to sleep.",
    "On the other side of the river the lights went out one by one.",
    "The train was late again, and nobody seemed to mind.",
    "He put the letters in a drawer and forgot about them.",
    "In the garden the apples were almost ripe.",
)
FILLER_TOKENS = 12


class CannotVerify(Exception):
    """No verdict, and why; `not_compressed` where the server plainly does not compress."""

    def __init__(self, message: str, not_compressed: bool = False) -> None:
        super().__init__(message)
        self.not_compressed = not_compressed


@dataclass(frozen=True)
class Report:
    """What happened; blocks and tokens are those of the compressed run, tokens per head.

    kernels: whose kernels ran, by what they do.
    """

    model: str
    prompt_tokens: int
    answer_off: str
    answer_on: str
    preset: str = ""
    blocks_before: int = 0
    blocks_after: int = 0
    held_tokens: int = 0
    kernels: dict[str, list[str]] = field(default_factory=dict)
    reason: str = ""

    @property
    def compressed(self) -> bool:
        return self.blocks_after < self.blocks_before

    @property
    def answers_agree(self) -> bool:
        return self.answer_off.strip() == self.answer_on.strip()

    @property
    def held_share(self) -> float:
        return self.held_tokens / self.prompt_tokens if self.compressed else 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "compressed": self.compressed,
            "answers_agree": self.answers_agree,
            "held_share": self.held_share,
        }


def verify_server(
    url: str,
    api_key: str = "",
    model: str = "",
    preset: str = "",
    rate: float = 8.0,
    tokens: int = 2000,
    prompt: str | None = None,
) -> Report:
    """Send the prompt twice and read what the server recorded.

    Raises:
        CannotVerify: the server cannot be reached, refuses, or runs without compression.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=TIMEOUT_S) as client:
        server = _Server(client)
        served = server.model(model)
        if not preset:
            preset = server.stats()["preset"]
            preset = DEFAULT_PRESET if preset in UNCOMPRESSED else preset
        room = served.get("max_model_len", tokens) - ANSWER_TOKENS - TEMPLATE_TOKENS
        prompt = prompt or long_prompt(served, min(tokens, room))
        off = server.ask(served["id"], prompt, {"kv_compress": OFF})
        on = server.ask(served["id"], prompt, {"kv_compress": preset, "kv_compress_rate": rate})
        record, kernels = server.record_of(on["id"]), server.stats()["kernels"]
    answers = served["id"], on["usage"]["prompt_tokens"], _answer(off), _answer(on)
    if record is None:
        reason = "the prompt is within its budget: send a longer one, or raise the rate"
        return Report(*answers, preset=preset, reason=reason)
    return Report(
        *answers,
        preset=record["preset"],
        blocks_before=record["blocks_before"],
        blocks_after=record["blocks_after"],
        held_tokens=record["held_tokens"],
        kernels=kernels,
    )


def long_prompt(served: dict[str, Any], tokens: int) -> str:
    """A fact, far back in about `tokens` tokens of filler, and a question about it."""
    names = {served["id"], PurePath(served.get("root") or "").name}
    if names & {"demo", "demo_model"}:
        from vllm_kvcompress.bench.demo_model.language import needle_task

        return needle_task(Random(32), tokens, 0.35).prompt
    rng = Random(32)
    sentences = [rng.choice(FILLER) for _ in range(max(1, tokens // FILLER_TOKENS - 4))]
    sentences.insert(len(sentences) // 3, FACT)
    return " ".join([*sentences, QUESTION])


class _Server:
    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def model(self, name: str) -> dict[str, Any]:
        served = self._call("GET", "/v1/models")["data"]
        found = next((one for one in served if name in ("", one["id"])), None)
        if found is None:
            known = ", ".join(one["id"] for one in served)
            raise CannotVerify(f"the server has no model {name!r}; it serves: {known}")
        return found

    def stats(self) -> dict[str, Any]:
        return self._call("GET", "/v1/kv_compress/stats")

    def ask(self, model: str, prompt: str, xargs: dict[str, Any]) -> dict[str, Any]:
        """One greedy answer, by chat or, where the model has no chat template, by completion."""
        body = {
            "model": model,
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "vllm_xargs": xargs,
        }
        chat = {**body, "messages": [{"role": "user", "content": prompt}]}
        try:
            return self._call("POST", "/v1/chat/completions", chat)
        except CannotVerify as error:
            if "chat template" not in str(error):
                raise
        return self._call("POST", "/v1/completions", {**body, "prompt": prompt})

    def record_of(self, answer_id: str) -> dict[str, Any] | None:
        """The server's record of the answer's first compression, None if it never comes."""
        give_up = time.monotonic() + WAIT_S
        while True:
            for record in self.stats()["recent"]:
                if record["request_id"].startswith(answer_id) and not record["is_recompression"]:
                    return record
            if time.monotonic() > give_up:
                return None
            time.sleep(0.2)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        where = f"{self._client.base_url}".rstrip("/")
        try:
            response = self._client.request(method, path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise CannotVerify(f"no answer from {where}: {error}") from None
        if response.is_success:
            try:
                return response.json()
            except ValueError:
                raise CannotVerify(f"{where}{path} answered no JSON: it is no vLLM") from None
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise CannotVerify(f"{where} wants another API key: give --api-key")
        if response.status_code == httpx.codes.NOT_FOUND and "kv_compress" in path:
            raise CannotVerify(
                f"{where} runs without compression: start it with `vllm serve MODEL --kv-compress`",
                not_compressed=True,
            )
        raise CannotVerify(f"{where}{path} answered {response.status_code}: {_message(response)}")


def _message(response: httpx.Response) -> str:
    try:
        return response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def _answer(response: dict[str, Any]) -> str:
    choice = response["choices"][0]
    return (choice["message"]["content"] if "message" in choice else choice["text"]) or ""
