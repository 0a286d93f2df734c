"""Ask a running server over HTTP, with the `openai` client."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import httpx

from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.quality.ask import Answer, Ask

TIMEOUT_S = 600.0
STATS = "/v1/kv_compress/stats"


class Server:
    """An `Answerer`, and the encoder of its prompts.

    Args:
        url: as `http://localhost:8000`, with or without `/v1`.
        model: the served name; empty for the first that the server lists.
        at_once: requests in flight.

    Raises:
        BenchError: on entering, when nothing fit to be asked listens there.
    """

    def __init__(self, url: str, api_key: str, model: str, at_once: int) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._api_key, self.model, self._at_once = api_key, model, at_once

    def __enter__(self) -> Self:
        from openai import OpenAI

        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_S)
        self._openai = OpenAI(
            base_url=f"{self.url}/v1",
            api_key=self._api_key or "none",
            timeout=TIMEOUT_S,
            max_retries=0,
        )
        self._threads = ThreadPoolExecutor(self._at_once)
        try:
            self._look()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *raised: Any) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._openai.close()
        self._http.close()

    def _look(self) -> None:
        served = self._json("GET", "/v1/models")["data"]
        names = [card["id"] for card in served]
        card = next((c for c in served if c["id"] == self.model or not self.model), None)
        if card is None:
            raise BenchError(f"{self.url} serves {', '.join(names)}, not {self.model!r}")
        self.model, self.max_model_len = card["id"], card["max_model_len"]
        self.block_tokens: int = self._json("GET", STATS)["block_tokens"]

    def _json(self, method: str, path: str, **body: Any) -> Any:
        try:
            response = self._http.request(method, path, json=body or None)
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise BenchError(f"no answer from {self.url}: {reason}") from None
        if path == STATS and response.status_code == 404:
            raise BenchError(f"{self.url} runs without --kv-compress: start it with that flag")
        if response.is_error:
            shown = " ".join(response.text.split())[:300]
            raise BenchError(f"{self.url}{path} answers {response.status_code}: {shown}")
        return response.json()

    def chat_ids(self, prompt: str) -> list[int]:
        turn = [{"role": "user", "content": prompt}]
        body = {"model": self.model, "messages": turn, "add_generation_prompt": True}
        return self._json("POST", "/tokenize", **body)["tokens"]

    def plain_ids(self, text: str, special: bool) -> list[int]:
        body = {"model": self.model, "prompt": text, "add_special_tokens": special}
        return self._json("POST", "/tokenize", **body)["tokens"]

    def answers(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        yield from self._threads.map(self._answer, asks)

    def _answer(self, ask: Ask) -> Answer:
        import openai

        try:
            said = self._openai.completions.create(
                model=self.model,
                prompt=list(ask.prompt.token_ids),
                max_tokens=ask.prompt.max_tokens,
                temperature=0,
                extra_body={"vllm_xargs": ask.knobs()},
            )
        except openai.APIStatusError as error:
            message = " ".join(str(error.message).split())[:300]
            raise BenchError(f"{self.url} refuses a request: {message}") from None
        except openai.APIError as error:
            raise BenchError(f"{self.url} does not answer any more: {error.message}") from None
        return Answer(said.choices[0].text)
