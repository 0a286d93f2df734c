"""The route stands behind what vLLM guards; bad knobs end a stream before it begins."""

import asyncio
from types import SimpleNamespace as Bag

import httpx
import pytest
from fastapi import FastAPI
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from vllm_kvcompress.serving.metrics import KVCompressStatLogger
from vllm_kvcompress.serving.routes import PATH, KVCompressRoutes, check_before_streaming
from vllm_kvcompress.serving.snapshots import Snapshots
from vllm_kvcompress.transport.timeline import Timelines


class Check:
    refusals = {"bad_rate": 2}  # noqa: RUF012

    def __call__(self, params) -> None:
        if params == "bad":
            raise ValueError("refused")


class Engine:
    """What the route asks of an `AsyncLLM`."""

    def __init__(self, loggers) -> None:
        self.logger_manager = loggers and Bag(stat_loggers=loggers)
        self.vllm_config = Bag(
            additional_config={"kv_compress": "snapkv"}, cache_config=Bag(block_size=32)
        )
        self.input_processor = Bag(validate_logits_processors_params=Check())
        self.started = []

    async def generate(self, prompt, sampling_params, request_id):
        self.started.append(request_id)
        yield prompt


def ask(engine, method="GET", path=PATH, tokens=("secret",), **headers) -> httpx.Response:
    """Start the application as a server does, ask once, and stop it."""
    app = FastAPI()
    app.state.engine_client = engine
    app.add_middleware(AuthenticationMiddleware, tokens=list(tokens))
    app.add_middleware(KVCompressRoutes)

    async def run() -> httpx.Response:
        inbox, started = asyncio.Queue(), asyncio.Event()

        async def sent(message) -> None:
            started.set()

        await inbox.put({"type": "lifespan.startup"})
        lifespan = asyncio.create_task(app({"type": "lifespan"}, inbox.get, sent))
        await started.wait()
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://server"
        ) as client:
            response = await client.request(method, path, headers=headers)
        await inbox.put({"type": "lifespan.shutdown"})
        await lifespan
        return response

    return asyncio.run(run())


@pytest.fixture
def logger() -> KVCompressStatLogger:
    logger = object.__new__(KVCompressStatLogger)
    logger.snapshots, logger.timelines = Snapshots(), Timelines()
    logger.timelines.add([["request", "r1", 0, 700, 0, 10.0, 10.5]])
    logger.timelines.add([["fetch", "r1", 0, 256, 2, 10.1, 10.125]])
    logger.timelines.add([["first_token", "r1", 640, 700, 0, 10.25, 10.25]])
    return logger


def test_the_figures_are_behind_the_key(logger) -> None:
    engine = Engine([object(), logger])
    assert ask(engine).status_code == 401
    assert ask(engine, Authorization="Bearer wrong").status_code == 401
    answer = ask(engine, Authorization="Bearer secret")
    assert answer.status_code == 200
    figures = answer.json()
    assert (figures["preset"], figures["block_tokens"]) == ("snapkv", 32)
    assert figures["refusals"] == {"bad_rate": 2} and figures["recent"] == []


def test_without_statistics_it_says_so() -> None:
    answer = ask(Engine(None), Authorization="Bearer secret")
    assert answer.status_code == 503
    assert "--disable-log-stats" in answer.json()["error"]["message"]


def test_nothing_else_is_answered(logger) -> None:
    engine = Engine([logger])
    assert ask(engine, path="/v1/kv_compress", Authorization="Bearer secret").status_code == 404
    assert ask(engine, method="POST", Authorization="Bearer secret").status_code == 405


def test_bad_knobs_are_refused_before_a_stream_begins(logger) -> None:
    engine = Engine([logger])
    check_before_streaming(engine)
    with pytest.raises(ValueError, match="refused"):
        engine.generate("prompt", "bad", "r1")

    async def first() -> str:
        return await anext(engine.generate("prompt", sampling_params="good", request_id="r2"))

    assert asyncio.run(first()) == "prompt"
    assert engine.started == ["r2"]
