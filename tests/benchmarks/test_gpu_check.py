"""The command that a GPU host runs: no section stops another, and every one says what it found."""

import json
import sys
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path

import pytest
from pytest import approx

from vllm_kvcompress.bench import gpu_check
from vllm_kvcompress.bench.gpu import engines, ttft
from vllm_kvcompress.bench.gpu.ceilings import Ceilings
from vllm_kvcompress.bench.gpu.section import SECTIONS
from vllm_kvcompress.bench.gpu.throughput import EIGHT_B, Work

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
    assert set(SECTIONS) == set(gpu_check.LIMITS_S)


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
    assert len(kernels) == 9 and all(row["met"] for row in kernels)
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


def test_a_rehearsal_captures_and_replays_and_says_what_it_is(
    tmp_path, capsys, monkeypatch
) -> None:
    report = tmp_path / "gpu.json"
    only = ["--only", "build", "graphs", "codec"]
    assert gpu_check.main(["--rehearse", *only, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["rehearsal"] and {s["state"] for s in found["sections"].values()} == {"ok"}
    assert "no figure below means anything" in capsys.readouterr().out


def test_verdicts_stand_beside_plain_vllm() -> None:
    plain = {"state": "ok", "seconds": 1.0, "tokens_s": 100.0, "few_tokens_s": 50.0}
    eight = plain | {"tokens_s": 250.0, "few_tokens_s": 48.0}
    ratio, off = gpu_check.beside_plain({"throughput-plain": plain, "throughput-8": eight})
    assert ratio["found"] == "2.50" and off["found"] == "0.96" and off["met"] is False
    assert "MISSED" in gpu_check.table({"beside": {**plain, "rows": [off]}})
    assert gpu_check.beside_plain({"throughput-8": eight}) == []


def test_the_bound_is_prefill_operations_and_bytes_moved() -> None:
    prompts, steps, held = 2, 10, 3e9
    work = Work(prompt_tokens=prompts * EIGHT_B.prompt_tokens, held_bytes=held, decode_steps=steps)
    parameters = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
    head = 4096 * 128_256
    n = EIGHT_B.prompt_tokens
    operations = 2 * parameters * n + 2 * head + 32 * 4 * 4096 * n * (n + 1) // 2
    moved = held + steps * 2 * (parameters + head)
    wanted = prompts * operations / 7e14 + moved / 3e12
    assert work.allowed_s(EIGHT_B, Ceilings(bytes_s=3e12, flops_s=7e14)) == approx(wanted)
    assert EIGHT_B.cache_blocks == 2 * 416 + 1


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
