"""The command that a GPU host runs: no section stops another, and every one says what it found."""

import json
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path

from pytest import approx

from vllm_kvcompress.bench import gpu_check
from vllm_kvcompress.bench.flops import Decoder
from vllm_kvcompress.bench.gpu import engines, section, ttft
from vllm_kvcompress.bench.gpu.ceilings import Ceilings
from vllm_kvcompress.bench.gpu.row import Row
from vllm_kvcompress.bench.gpu.section import SECTIONS
from vllm_kvcompress.bench.gpu.skipped import Skipped
from vllm_kvcompress.bench.gpu.throughput import EIGHT_B, Work

CHECKOUT = Path(__file__).parents[2]


SAYS = """
import json, sys
print("noise", flush=True)
def say(**message):
    print(json.dumps(message), flush=True)
figures = json.loads(sys.stdin.readline())
"""
GOOD = "say(row={'what': 'a', 'found': '1', 'met': True, 'figures': {'seven': 7}}); say(state='ok')"
ROW = "say(row={'what': 'a', 'found': '1'}); "


def run(tmp_path, total_s=60.0, limit_s=30.0, **codes) -> tuple[gpu_check.Report, dict]:
    """Sections of this code, and the file that they leave."""
    report = gpu_check.Report(tmp_path / "gpu.json", {})
    commands = {name: [sys.executable, "-c", SAYS + code] for name, code in codes.items()}
    gpu_check.run(commands, dict.fromkeys(codes, limit_s), total_s, {}, report)
    return report, json.loads(report.path.read_text())["sections"]


def test_a_section_that_breaks_stops_no_other_and_keeps_its_rows(tmp_path, capsys) -> None:
    report, found = run(
        tmp_path,
        broken=ROW + "raise ValueError('out of pages')",
        killed=ROW + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        silent="sys.exit(3)",
        good=GOOD,
    )
    assert [section["state"] for section in found.values()] == ["failed"] * 3 + ["ok"]
    whys = [section.get("why") for section in found.values()]
    assert whys[:2] == ["ValueError: out of pages", "killed by SIGKILL"]
    assert whys[2:] == ["it ended with 3 and said nothing", None]
    assert [len(section["rows"]) for section in found.values()] == [1, 1, 0, 1]
    assert report.code() == 1
    assert "3 of 4 sections did not reach their end" in report.summary()
    assert "met     a: 1" in capsys.readouterr().out


def test_a_section_that_hangs_is_cut_off_with_all_that_it_started(tmp_path) -> None:
    child = tmp_path / "child"
    hangs = f"""{ROW}
import subprocess, time
child = subprocess.Popen(["sleep", "60"])
open({str(child)!r}, "w").write(str(child.pid))
time.sleep(60)"""
    report, found = run(tmp_path, limit_s=3, hangs=hangs, good=GOOD)
    assert found["hangs"]["state"] == "timed out" and len(found["hangs"]["rows"]) == 1
    assert found["good"]["state"] == "ok" and report.code() == 1
    with suppress(FileNotFoundError):  # else it is dead, and not yet buried
        state = Path(f"/proc/{child.read_text()}/stat").read_text().split()[2]
        assert state == "Z"


def test_sections_for_which_no_time_is_left_say_so(tmp_path) -> None:
    _, found = run(tmp_path, total_s=2, slow="import time; time.sleep(60)", late=GOOD)
    assert [section["state"] for section in found.values()] == ["timed out"] * 2
    assert found["late"]["why"] == "no time was left: see --minutes"


def test_later_sections_are_told_the_figures_of_earlier_ones(tmp_path) -> None:
    told = "say(row={'what': 'b', 'found': str(figures)}); say(state='ok')"
    report, found = run(tmp_path, good=GOOD, told=told)
    assert found["told"]["rows"][0]["found"] == "{'seven': 7}"
    assert report.code() == 0 and "1 verdicts met, 0 missed" in report.summary()


def test_a_missed_verdict_is_the_sections_and_the_commands(tmp_path, capsys) -> None:
    missed = "say(row={'what': 'a', 'found': '1', 'bound': '>= 2', 'met': False}); say(state='ok')"
    report, found = run(tmp_path, missed=missed)
    assert found["missed"]["state"] == "missed" and report.code() == 1
    assert "MISSED  a: 1  [>= 2]" in capsys.readouterr().out


def test_rows_are_in_the_file_when_the_command_is_ended_from_outside(tmp_path) -> None:
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-P", gpu_check.__file__, "--rehearse", "--only", "graphs"]
    process = subprocess.Popen([*command, "--json", str(path)], stdout=subprocess.PIPE)
    while b"software" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0].decode()
    found = json.loads(path.read_text())["sections"]
    last = list(found.values())[-1]
    assert process.returncode == 130 and last["state"] == "interrupted"
    assert len(found["machine"]["rows"]) >= 3 and "did not reach their end" in said


def test_a_report_that_cannot_be_written_is_one_line_before_anything_runs(tmp_path, capsys) -> None:
    assert gpu_check.main(["--rehearse", "--json", str(tmp_path / "no" / "gpu.json")]) == 2
    assert "gpu.json cannot be written: No such file or directory" in capsys.readouterr().err


def test_measuring_goes_on_where_the_report_cannot_be_written_any_more(tmp_path, capsys) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    report = gpu_check.Report(folder / "gpu.json", {})
    report.begin("good", 1)
    folder.rmdir()
    report.add("good", {"what": "a", "found": "1"})
    report.close("good", 1.0, "ok")
    assert report.code() == 0 and "cut off here" in capsys.readouterr().err


def test_without_a_gpu_one_line_says_so(capsys) -> None:
    assert gpu_check.main(["--only", "graphs"]) == 2
    said = capsys.readouterr()
    assert "skipped" in said.out and "torch sees no CUDA GPU" in said.out
    assert "graphs" not in said.out and "--rehearse" in said.err


def test_limits_leave_time_for_the_last_section_when_one_hangs() -> None:
    limits = gpu_check.LIMITS_S
    assert set(SECTIONS) == {*limits, *gpu_check.ON_REQUEST_S}
    for last in ("plain", "compressed"):
        before = [s for name, s in limits.items() if name != last]
        assert max(before) + limits[last] <= 60 * gpu_check.MINUTES


def test_a_section_ends_with_what_became_of_it() -> None:
    def rows(figures):
        yield Row("a", "1", figures={"b": 2.0})
        raise figures["error"]

    def said(error):
        return list(section.messages(rows, {"error": error}))

    assert said(Skipped("no GPU"))[1:] == [{"state": "skipped", "why": "no GPU"}]
    row, end = said(ValueError("two\nlines"))
    assert row == {"row": {"what": "a", "found": "1", "figures": {"b": 2.0}}}
    assert (end["state"], end["why"]) == ("failed", "ValueError: two lines")


def test_first_tokens_are_held_against_operations_and_against_off() -> None:
    """4 layers, the last 2 see a part: at a time per operation, the time is the bound."""
    decoder, lengths, per_flop = Decoder.llama(4, 64), (320, 640), 1e-9

    def seconds(selected):
        floating = {n: decoder.prefill(n, selected(n), 1) for n in lengths}
        return {n: per_flop * sum(flops) for n, flops in floating.items()}

    plain = seconds(lambda n: None)
    slower = {n: 1.03 * s for n, s in plain.items()}
    timed = {"plain vLLM": plain, "off": plain, "kv-compress": slower}
    rows = list(ttft.report(decoder, 32, timed | {"tsp": seconds(lambda n: n // 5)}))
    assert [row.what.split(", ")[1] for row in rows[::2]] == ["off", "kv-compress", "tsp"]
    assert "0.97 x as fast as plain vLLM, +3.0% beside off" in rows[3].found
    assert [row.met for row in rows] == [None, None, None, False, None, None]
    for row in rows[4:]:
        faster = float(row.found.split(", ")[1].split()[0])
        assert row.found.endswith(f"; {faster:.2f} by operations, {faster:.2f} by their time")
        assert 4 / 2.4 < faster < 4 / 2.08, "between linear layers and attention"
    (only, _) = ttft.report(decoder, 32, {"plain vLLM": plain})
    assert only.figures == {"plain_first_token_s_320": plain[320]}


def test_a_rehearsal_captures_and_replays_and_says_what_it_is(tmp_path, capsys) -> None:
    path = tmp_path / "gpu.json"
    only = ["--only", "codec", "graphs"]
    assert gpu_check.main(["--rehearse", *only, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["rehearsal"] and {s["state"] for s in found["sections"].values()} == {"ok"}
    assert list(found["sections"]) == ["machine", "graphs", "codec"]
    assert "no figure below means anything" in capsys.readouterr().out


def test_the_bound_is_prefill_operations_and_bytes_moved() -> None:
    prompts, steps, held = 2, 10, 3e9
    work = Work(prompt_tokens=prompts * EIGHT_B.prompt_tokens, held_bytes=held, decode_steps=steps)
    parameters = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
    head = 4096 * 128_256
    n = EIGHT_B.prompt_tokens
    operations = 2 * parameters * n + 2 * head + 32 * 4 * 4096 * n * (n + 1) // 2
    weights = 2 * (parameters + head)
    wanted = prompts * operations / 7e14 + (held + steps * weights) / 3e12
    assert work.allowed_s(EIGHT_B, Ceilings(bytes_s=3e12, flops_s=7e14)) == approx(wanted)
    assert EIGHT_B.cache_blocks == 2 * 416 + 1 and EIGHT_B.block_bytes == 2 << 20
    assert (operations / 1e12, weights / 1e9) == approx((95.7, 15.0), abs=0.05)


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
