"""The rows of every speed table: what a user could run instead, and how each is asked."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import typer

from vllm_kvcompress.accounting import held_share, plan
from vllm_kvcompress.bench.child import COMMAND, Child
from vllm_kvcompress.bench.engine import BLOCK_TOKENS, Cache, EngineSpec
from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.process import ProcessEnded
from vllm_kvcompress.presets import DEFAULT_PRESET, MAX_RATE, OFF, shipped_presets

PLAIN, FP8, FLAG_OFF = "plain vLLM", "fp8 cache", "flag off"


@dataclass(frozen=True)
class Engine:
    """How an engine is started. Engines that are equal are one process."""

    name: str
    kv_compress: Mapping[str, Any] | None = field(default=None, hash=False)
    plugin: bool = True
    kv_cache_dtype: str = "auto"


@dataclass(frozen=True)
class Variant:
    """A row: an engine, and what its requests ask for."""

    name: str
    meaning: str
    engine: Engine
    asks: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    rate: float | None = None

    @property
    def compresses(self) -> bool:
        return self.rate is not None and self.rate > 1

    @property
    def does_plain_work(self) -> bool:
        """Whether its tokens, and nearly its time, must be plain vLLM's."""
        return self.name in (FLAG_OFF, OFF)

    def held_share(self, prompt_tokens: int, cache_blocks: int) -> float:
        """Share of a prompt's tokens held once it is compressed, as both sides compute it."""
        if self.preset is None:
            return 1.0
        settings = shipped_presets()[self.preset].settings(
            rate=self.rate, force_arena=self.engine == FORCED
        )
        return held_share(plan(prompt_tokens, BLOCK_TOKENS, cache_blocks + 1, settings))


COMPRESSING = Engine("kv-compress", {"preset": DEFAULT_PRESET})
FORCED = Engine("kv-compress, forced", {"rate": 1, "test_force_arena": True})
STOCK = Variant(PLAIN, "no plugin loaded", Engine(PLAIN, plugin=False))
STOCK_FP8 = Variant(
    FP8,
    "plain vLLM with --kv-cache-dtype fp8, in as many bytes",
    Engine(FP8, plugin=False, kv_cache_dtype="fp8"),
)
IDLE = Variant(FLAG_OFF, "plugin installed, kv-compress not asked for", Engine(FLAG_OFF))
ALL_OFF = Variant(OFF, "kv-compress on, every request off", COMPRESSING, {"kv_compress": OFF})


def compressing(preset: str, rate: float) -> Variant:
    """A preset at a rate; rate 1 sends everything through an arena and drops nothing."""
    name = f"rate {rate:g}" if preset == DEFAULT_PRESET else f"{preset} {rate:g}"
    if rate == 1:
        return Variant(name, "everything kept, through an arena", FORCED, {}, DEFAULT_PRESET, 1)
    asks = {"kv_compress": preset, "kv_compress_rate": rate}
    return Variant(name, f"preset {preset}", COMPRESSING, asks, preset, rate)


def keeping_all(preset: str) -> Variant:
    """A preset that evicts nothing; what it does is done before."""
    return Variant(preset, f"preset {preset}", COMPRESSING, {"kv_compress": preset}, preset, 1)


def variants(
    rates: Sequence[float],
    presets: Sequence[str] = (DEFAULT_PRESET,),
    *,
    fp8: bool = True,
    off: bool = True,
    flag_off: bool = False,
) -> list[Variant]:
    """The rows, plain vLLM first; a preset whose own rate is 1 has one row, without a rate.

    Raises:
        typer.BadParameter: an unknown preset, or a rate that no request may ask for.
    """
    for preset in presets:
        if preset not in shipped_presets():
            known = ", ".join(shipped_presets())
            raise typer.BadParameter(f"{preset!r} is no preset; there are {known}")
    for rate in rates:
        if not 1 <= rate <= MAX_RATE:
            raise typer.BadParameter(f"rate {rate:g} is not between 1 and {MAX_RATE:g}")
    rows = [STOCK]
    rows += [row for row, wanted in ((STOCK_FP8, fp8), (IDLE, flag_off), (ALL_OFF, off)) if wanted]
    for preset in presets:
        if shipped_presets()[preset].rate == 1:
            rows.append(keeping_all(preset))
        else:
            rows += [compressing(preset, rate) for rate in sorted(rates)]
    return list({row.name: row for row in rows}.values())


@contextmanager
def started(
    rows: Sequence[Variant],
    spec: EngineSpec,
    threads: int,
    *,
    refused: dict[str, str],
    command: Sequence[str] = COMMAND,
) -> Iterator[dict[str, Child]]:
    """The engines of the rows, each a stopped process, by the rows' names.

    All get plain vLLM's cache in bytes. An engine that does not start leaves its rows out and
    its last words in `refused`; without plain vLLM there is nothing to compare with.

    Raises:
        BenchError: plain vLLM does not start.
    """
    children: dict[Engine, Child] = {}
    words: dict[Engine, str] = {}
    with ExitStack() as stack:
        plain: Cache | None = None
        for row in rows:
            engine = row.engine
            if engine not in children and engine not in words:
                child = Child(
                    engine.name, _own(spec, engine, plain), threads, engine.plugin, command
                )
                try:
                    children[engine] = stack.enter_context(child)
                except ProcessEnded as ended:
                    if row.name == PLAIN:
                        raise BenchError(f"plain vLLM does not start: {ended.reason}") from None
                    words[engine] = ended.reason
                plain = plain or children[engine].cache
            if engine in words:
                refused[row.name] = words[engine]
        yield {row.name: children[row.engine] for row in rows if row.engine in children}


def _own(spec: EngineSpec, engine: Engine, plain: Cache | None) -> EngineSpec:
    blocks = spec.cache_blocks
    if engine.kv_cache_dtype == "fp8" and plain is not None:
        blocks *= plain.element_bytes  # an fp8 element takes one byte
    return replace(
        spec,
        kv_compress=engine.kv_compress,
        kv_cache_dtype=engine.kv_cache_dtype,
        cache_blocks=blocks,
    )
