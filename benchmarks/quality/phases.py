"""Who answers which rows of `bench quality`: engines, a server, peers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import typer

from vllm_kvcompress.bench.engine import EngineSpec
from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.peers.spec import PeerSpec
from vllm_kvcompress.bench.quality.ask import Answerer
from vllm_kvcompress.bench.quality.rows import FP8, PLAIN, Row
from vllm_kvcompress.bench.quality.run import CannotOpen, Phase
from vllm_kvcompress.presets import (
    DEFAULT_PRESET,
    OFF,
    Preset,
    load_preset,
    shipped_presets,
    unknown_preset,
)

MOST_CACHE_BLOCKS = 6000


@dataclass(frozen=True)
class Policies:
    """The rows that are presets, and the presets behind them."""

    budgets: Sequence[float]
    presets: Mapping[str, Preset]
    own: Mapping[str, Preset]  # read from files: the engine must be told of them

    @staticmethod
    def of(given: Sequence[str], budgets: Sequence[float]) -> "Policies":
        """Names of shipped presets, or files of presets.

        Raises:
            BenchError: an unknown name, a file that is no preset, a budget that is no share.
        """
        for budget in budgets:
            if not 0 < budget <= 1:
                raise BenchError(f"a budget is {budget:g}: give shares of the cache, above 0 to 1")
        shipped = shipped_presets()
        presets: dict[str, Preset] = {}
        own: dict[str, Preset] = {}
        for name in given or [n for n, preset in shipped.items() if not preset.continual]:
            if name in shipped:
                presets[name] = shipped[name]
            elif name.endswith((".yaml", ".yml")):
                try:
                    preset = load_preset(name)
                except ValueError as error:
                    raise BenchError(str(error)) from None
                presets[preset.name] = own[preset.name] = preset
            elif name != OFF:
                raise BenchError(unknown_preset(name, shipped))
        first = sorted(presets, key=lambda name: name != DEFAULT_PRESET)
        return Policies(budgets, {name: presets[name] for name in first}, own)

    def rows(self) -> list[Row]:
        return [Row(name, "preset", b) for name in self.presets for b in self.budgets]


@dataclass
class Options:
    """What the command line said, as far as the steps below share it."""

    model: str
    dtype: str
    threads: int
    at_once: int
    block_tokens: int
    policies: Policies
    cache_blocks: int = 0  # 0: enough
    peers: Sequence[PeerSpec] = ()
    fp8: bool = False

    def engine(self, name: str, longest: int, kv_cache_dtype: str | None = None) -> Answerer:
        """Ours without `kv_cache_dtype`, plain vLLM with it."""
        from vllm_kvcompress.bench.quality.engines import Engine

        ours = kv_cache_dtype is None
        presets = {n: p.model_dump(mode="json") for n, p in self.policies.own.items()}
        blocks = -(-longest // self.block_tokens)
        spec = EngineSpec(
            model=self.model,
            cache_blocks=self.cache_blocks
            or max(3 * blocks + 8, min(self.at_once * blocks, MOST_CACHE_BLOCKS)),
            kv_compress={"preset": OFF, "presets": presets} if ours else None,
            max_model_len=longest,
            batched_tokens=max(8192, longest),
            max_seqs=self.at_once,
            block_tokens=self.block_tokens,
            dtype=self.dtype,
            kv_cache_dtype=kv_cache_dtype or "auto",
        )
        return Engine(name, spec, self.threads, plugin=ours, at_once=4 * self.at_once)

    def peer(self) -> Answerer:
        from vllm_kvcompress.bench.peers.environment import peer_python
        from vllm_kvcompress.bench.peers.errors import PeerError
        from vllm_kvcompress.bench.peers.kvpress import KVPress
        from vllm_kvcompress.bench.quality.peer import Peer

        try:
            python = peer_python("kvpress", partial(typer.echo, err=True))
        except PeerError as error:
            raise CannotOpen(str(error)) from None
        return Peer(KVPress(python, self.model, self.dtype, self.threads), self.peers)


def phases(options: Options, server: Any, longest: int) -> list[Phase]:
    """Who answers which rows: engines one after the other, or a server, then the peers."""
    ours = options.policies.rows()
    plain, fp8 = Row(PLAIN, "plain"), Row(FP8, "fp8")
    presses = [Row(str(p), "peer", b) for p in options.peers for b in options.policies.budgets]
    if server is not None:
        out = [Phase([plain, *ours], lambda: _Left(server))]
        why = "needs a server of its own"
        out += [Phase([fp8], _refuses(why))] if options.fp8 else []
    else:
        out = [Phase([plain], lambda: options.engine(PLAIN, longest, "auto"))]
        fp8_engine = partial(options.engine, FP8, longest, "fp8")
        out += [Phase([fp8], lambda: _Optional(fp8_engine()))] if options.fp8 else []
        out += [Phase(ours, lambda: options.engine("vLLM with kv-compress", longest))]
    return [*out, Phase(presses, options.peer)]


class _Left:
    """An answerer that somebody else opened and will close."""

    def __init__(self, inner: Answerer) -> None:
        self._inner, self.answers = inner, inner.answers

    def __enter__(self) -> "_Left":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class _Optional(_Left):
    """An answerer whose refusal to start is a row's note, not the end of the run."""

    def __enter__(self) -> "_Left":
        try:
            self._inner.__enter__()
        except BenchError as error:
            raise CannotOpen(str(error)) from None
        return self

    def __exit__(self, *raised: Any) -> None:
        self._inner.__exit__(*raised)


def _refuses(why: str) -> Callable[[], Answerer]:
    def refuse() -> Answerer:
        raise CannotOpen(why)

    return refuse
