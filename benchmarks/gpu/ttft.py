"""Time to the first token: what compression adds, and what selecting tokens saves."""

from collections.abc import Iterator, Mapping

from vllm_kvcompress.accounting import tsp_selected_tokens
from vllm_kvcompress.bench.flops import Cost, Decoder, timed
from vllm_kvcompress.bench.gpu.row import Row, on_speed
from vllm_kvcompress.presets import shipped_presets

PLAIN, OFF = "plain vLLM", "off"
OF_PREFILL = 0.02
Seconds = Mapping[int, float]
"""Prompt tokens to seconds until the first token."""


def figure(n: int) -> str:
    """The name of plain vLLM's seconds among a report's figures."""
    return f"plain_first_token_s_{n}"


def report(decoder: Decoder, block_tokens: int, seconds: Mapping[str, Seconds]) -> Iterator[Row]:
    """Presets beside plain vLLM by what they leave out, and beside `off` by what they add.

    The bounds by operations count all alike, and by what each kind cost plain vLLM here.

    Args:
        seconds: by preset; of `PLAIN` and `OFF` they may be missing or empty. `PLAIN`'s own rows
            are written where nobody else's are.
    """
    plain = seconds.get(PLAIN, {})
    cost = timed({decoder.prefill(n): s for n, s in plain.items()})
    for name, own in seconds.items():
        if name == PLAIN and len(seconds) > 1:
            continue
        for n, s in own.items():
            found, bound, met = f"{1e3 * s:.1f} ms", None, None
            if name != PLAIN and n in plain:
                found += f", {plain[n] / s:.2f} x as fast as plain vLLM"
            preset = shipped_presets().get(name)
            if preset is not None and preset.propagates:
                selected = tsp_selected_tokens(n, block_tokens, preset.settings())
                whole = decoder.prefill(n)
                part = decoder.prefill(n, selected, preset.last_full_layer(decoder.layers))
                found += f"; {Cost().of(whole) / Cost().of(part):.2f} by operations"
                if cost is not None:
                    found += f", {cost.of(whole) / cost.of(part):.2f} by their time"
            elif preset is not None and n in seconds.get(OFF, {}):
                more = s / seconds[OFF][n] - 1
                found += f", {more:+.1%} beside off"
                if n == max(own):
                    bound, met = f"<= {OF_PREFILL:.0%}", on_speed(more <= OF_PREFILL)
            figures = {figure(n): s} if name == PLAIN else {}
            yield Row(f"first token of {n}, {name}", found, bound, met, figures)
