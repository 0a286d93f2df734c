"""`GET /v1/kv_compress/stats`, and bad knobs refused before a stream begins.

vLLM's own option `--middleware` takes us in. Middleware given there stands outside vLLM's check
of `--api-key`; so this one answers nothing itself: when the server starts it adds an ordinary
route to the application, inside that check, and then steps aside.
"""

import functools
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_kvcompress.config import parse_engine_config
from vllm_kvcompress.presets import OFF
from vllm_kvcompress.serving.attach import attach_to_requests
from vllm_kvcompress.serving.metrics import KVCompressStatLogger

PATH = "/v1/kv_compress/stats"
NO_STATISTICS = "no statistics: this server runs with --disable-log-stats"


class KVCompressRoutes:
    """ASGI middleware; named in `args.middleware` while the flag is on."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            application = scope["app"]
            if engine_client := getattr(application.state, "engine_client", None):
                application.router.routes.insert(0, Route(PATH, stats, methods=["GET"]))
                check_before_streaming(engine_client)
                attach_to_requests()
        await self.app(scope, receive, send)


async def stats(request: Request) -> JSONResponse:
    """The figures of all engines; fields in docs/verification.md."""
    client = request.app.state.engine_client
    loggers = client.logger_manager.stat_loggers if client.logger_manager else []
    ours = next((one for one in loggers if isinstance(one, KVCompressStatLogger)), None)
    if ours is None:
        return JSONResponse({"error": {"message": NO_STATISTICS}}, status_code=503)
    vllm_config = client.vllm_config
    raw = (vllm_config.additional_config or {}).get("kv_compress")
    return JSONResponse(
        {
            "preset": parse_engine_config(raw).preset if raw else OFF,
            "block_tokens": vllm_config.cache_config.block_size,
            **ours.snapshots.summed(),
            "cachegen_timelines": ours.timelines.to_list(),
            "refusals": client.input_processor.validate_logits_processors_params.refusals,
        }
    )


def check_before_streaming(engine_client: Any) -> None:
    """Check a request's knobs when `generate` is called, not when its stream is first read.

    By then the status line of a streamed answer, 200, would be on its way.
    """
    generate: Callable[..., AsyncGenerator[Any, None]] = engine_client.generate
    check = engine_client.input_processor.validate_logits_processors_params

    @functools.wraps(generate)
    def checked(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        check(sampling_params)
        return generate(prompt, sampling_params, *args, **kwargs)

    engine_client.generate = checked
