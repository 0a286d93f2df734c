"""The command that a GPU host runs: no section stops another, and every one says what it found."""

import json
import sys
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path

import pytest

from vllm_kvcompress.bench import gpu_check
from vllm_kvcompress.bench.gpu import engines, ttft
from vllm_kvcompress.bench.gpu.section import sections

CHECKOUT = Path(__file__).parents[2]


def section(code: str, limit_s: float = 20) -> dict:
    return gpu_check.run_section("any", limit_s, {}, [sys.executable, "-c", code])


def test_a_section_that_breaks_or_hangs_is_a_result() -> None:
    good = section('print(\'noise\'); print(\'{"state": "ok", "rows": []}\')')
    assert good["state"] == "ok" and good["seconds"] >= 0
    broken = section("raise ValueError('out of pages')")
    assert broken["state"] == "failed" and broken["why"] == "ValueError: out of pages"
    assert section("print('[1]')")["state"] == "failed"
    assert section("pass")["why"] == "it said nothing"
    assert section("import time; time.sleep(60)", limit_s=0.5)["state"] == "timed out"


def test_all_sections_fit_into_eight_minutes_and_exist() -> None:
    assert sum(gpu_check.LIMITS_S.values()) <= 480
    assert set(sections()) == set(gpu_check.LIMITS_S)


def test_without_a_gpu_kernels_are_checked_and_the_rest_is_skipped(
    tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(gpu_check, "LIMITS_S", dict.fromkeys(gpu_check.LIMITS_S, 290))
    report = tmp_path / "gpu.json"
    only = ["--only", "kernels", "graphs", "throughput-8"]
    assert gpu_check.main([*only, "--json", str(report)]) == 0
    found = json.loads(report.read_text())["sections"]
    assert [found[name]["state"] for name in only[1:]] == ["ok", "skipped", "skipped"]
    kernels = found["kernels"]["rows"]
    assert len(kernels) == 9 and all(row["ok"] for row in kernels)
    said = capsys.readouterr().out
    assert "attend_pages float32" in said and "torch sees no CUDA GPU" in said


def test_first_tokens_are_timed_and_held_against_flops() -> None:
    """4 layers, the last 2 see a part: at a time per operation, the time is the bound."""
    scale = replace(ttft.SMALL, lengths=(320, 640))
    per_flop = 1e-12

    def seconds(selected):
        floating = {n: scale.decoder.prefill(n, selected(n), 1) for n in scale.lengths}
        return {n: per_flop * sum(flops) for n, flops in floating.items()}

    timed = {"plain vLLM": seconds(lambda n: None), "tsp": seconds(lambda n: n // 5)}
    rows = ttft.report(scale, timed)["rows"]
    assert [row["what"] for row in rows[2:]] == ["tsp, 320 tokens", "tsp, 640 tokens"]
    for row in rows[2:]:
        faster = row["found"].split()[-1]
        assert row["bound"] == f"{faster} by FLOPs, {faster} by timed FLOPs"
        assert 4 / 2.4 < float(faster) < 4 / 2.08, "between linear layers and attention"


@pytest.mark.engine
def test_first_tokens_of_a_small_model_without_a_gpu(monkeypatch) -> None:
    for name, value in (gpu_check.ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"}).items():
        monkeypatch.setenv(name, value)
    rows = ttft.ttft(replace(ttft.SMALL, lengths=(128,)))["rows"]
    assert [row["what"].split(",")[0] for row in rows] == ["plain vLLM", "tsp", "fastkv", "off"]
    assert ["by FLOPs" in row.get("bound", "") for row in rows] == [False, True, True, False]


def test_a_checkout_is_laid_out_as_an_install(tmp_path) -> None:
    site = tmp_path / "site"
    gpu_check.lay_out(CHECKOUT, site)
    for module in ("plugin.py", "kernels/attention.py", "bench/gpu/section.py", "configs"):
        assert (site / "vllm_kvcompress" / module).exists()
    (found,) = distributions(path=[str(site)])
    (entry,) = found.entry_points
    assert (
        entry.group == "vllm.general_plugins" and entry.value == "vllm_kvcompress.plugin:register"
    )


def test_answers_agree_up_to_a_word_that_hardly_led() -> None:
    def answer(tokens, second):
        chances = [{1: logprob(-0.1), 2: logprob(second)}] * len(tokens)
        return type("Answer", (), {"token_ids": tokens, "logprobs": chances})()

    def logprob(value):
        return type("Logprob", (), {"logprob": value})()

    plain = [answer([1, 1, 1], -0.12), answer([1, 1], -5.0)]
    assert engines.same_words([answer([1, 2, 1], 0), answer([1, 1], 0)], plain, lead=0.05) == 2
    assert engines.same_words([answer([1, 1, 1], 0), answer([2, 1], 0)], plain, lead=0.05) == 1
