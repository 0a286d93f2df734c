import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_kvcompress.bench import serve, serve_client, vllm_server
from vllm_kvcompress.bench.engine import MODEL, environment
from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.process import last_words
from vllm_kvcompress.bench.serve import Serve, Serving, measure, started
from vllm_kvcompress.bench.serve_client import BenchFailed, Load, Run, look, run
from vllm_kvcompress.bench.serve_report import plot, tables, verdicts
from vllm_kvcompress.bench.variants import FP8, OFF, PLAIN, STOCK, STOCK_FP8, variants
from vllm_kvcompress.bench.vllm_server import CannotStart, VllmServer, causes, free_port

FAKE = (sys.executable, str(Path(__file__).parent / "fake_vllm.py"))
ROWS = variants([2, 8])
HOW = Serve("a-model", 100, 600, 8, 512, "float32", eager=True)
LOAD = Load(4, 512, 32, float("inf"))


def fake_server(name: str = "plain vLLM", *arguments: str, **more) -> VllmServer:
    return VllmServer(name, arguments, {}, command=FAKE, **more)


def measured(monkeypatch, mishaps: str = "", rounds: int = 2, loads=(LOAD,)):
    """All rows against stand-ins of their servers."""
    monkeypatch.setenv("FAKE_VLLM", mishaps)
    refused: dict[str, str] = {}
    said: list[str] = []
    with started(ROWS, HOW, 1, 0, 20, refused, said.append, FAKE) as serving:
        samples = measure(ROWS, serving, loads, rounds, 0, refused, said.append, FAKE)
    return samples, refused, said


def test_rows_take_turns_and_are_compared_with_plain_vllm(monkeypatch):
    samples, refused, said = measured(monkeypatch)
    assert refused == {}
    runs = samples[float("inf")]
    assert {name: len(of) for name, of in runs.items()} == {row.name: 2 for row in ROWS}
    first = [text for text in said if text.startswith("round 1")]
    second = [text for text in said if text.startswith("round 2")]
    assert len(first) == len(second) == len(ROWS) and first[0][9:] != second[0][9:]
    throughput, latency = tables(ROWS, samples, LOAD, refused, 2)
    shown = {row[0]: row for row in throughput.rows}
    assert list(shown) == [PLAIN, FP8, OFF, "rate 2", "rate 8"]
    assert [shown[name][-1] for name in shown] == ["1.00", "1.50", "1.00", "2.00", "8.00"]
    assert shown["rate 8"][1:3] == ["12.5%", "40"] and shown[OFF][1:3] == ["100.0%", "0"]
    assert throughput.columns[-1] == "x plain" and shown[PLAIN][4] == "-"  # no goodput asked for
    assert {row[0]: row[-1] for row in latency.rows}["rate 8"] == "0.12"
    assert all(verdict.met for verdict in verdicts(ROWS, samples))


def test_a_refused_row_says_so_in_words(monkeypatch):
    samples, refused, _ = measured(monkeypatch, "fp8:refuse", rounds=1)
    assert refused == {FP8: "FP8 KV cache on CPU requires x86 with AVX-512 or AMX."}
    shown = tables(ROWS, samples, LOAD, refused, 1)[0]
    assert shown.rows[1][:2] == [FP8, "refused"] and "AVX-512" in shown.note


def test_a_server_that_dies_loses_its_rows_and_the_rest_runs(monkeypatch):
    loads = [LOAD, replace(LOAD, request_rate=4)]
    samples, refused, _ = measured(monkeypatch, "ours:die", 1, loads)
    assert set(samples[4]) == {PLAIN, FP8}
    assert set(samples[float("inf")]) == {PLAIN, FP8}
    assert set(refused) == {OFF, "rate 2", "rate 8"}
    assert all("the engine core is gone" in reason for reason in refused.values())


def test_without_plain_vllm_there_is_one_clear_line(monkeypatch):
    with pytest.raises(BenchError, match=r"^plain vLLM: .*the engine core is gone$"):
        measured(monkeypatch, "plain:die")
    with pytest.raises(BenchError, match=r"^plain vLLM does not start: FP8 KV"):
        measured(monkeypatch, "plain:refuse")


def test_a_build_slowed_fivefold_is_caught(monkeypatch):
    samples, _, _ = measured(monkeypatch, "ours:slow", rounds=1)
    missed = {v.what.split(",")[0] for v in verdicts(ROWS, samples) if not v.met}
    assert missed == {OFF, "rate 2"}  # eightfold faster, fivefold slowed, is still faster


def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "plain:hang")
    with pytest.raises(CannotStart, match="not healthy after 1 s"), fake_server(start_s=1):
        pass


def test_a_port_that_cannot_be_had_is_one_clear_line():
    with socket.socket() as taken:
        taken.bind((vllm_server.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BenchError, match=f"port {port} cannot be used: Address already in use"):
            free_port(port)
    with pytest.raises(BenchError, match=r"port 99999 cannot be used: .*0-65535"):
        free_port(99999)


def test_the_cause_is_told_not_what_follows_from_it():
    log = (
        "(EngineCore pid=7) ERROR 11-21 09:40:12 [core.py:1100] RuntimeError: Worker failed with "
        "error 'FP8 is not', please check the stack trace above for the root cause\n"
        "(EngineCore pid=7)     raise e\n"
        "(APIServer pid=5) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert last_words(causes(log).splitlines()) == "FP8 is not"
    assert causes("plain (text) stays: [x.py:1] so") == "plain (text) stays: [x.py:1] so"


def state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]


def wait_for(process: int, states: str) -> None:
    give_up = time.monotonic() + 60
    while state(process) not in states:
        assert time.monotonic() < give_up, state(process)
        time.sleep(0.01)


def test_a_waiting_server_is_stopped_and_an_ended_one_is_gone():
    with fake_server() as server:
        process = server._process.pid
        wait_for(process, "T")
        server.resume()
        wait_for(process, "RS")
        server.pause()
    assert not Path(f"/proc/{process}").exists()


def test_servers_differ_in_what_their_rows_say_and_in_nothing_else():
    plain, fp8 = HOW.arguments(STOCK.engine), HOW.arguments(STOCK_FP8.engine)
    ours = HOW.arguments(ROWS[-1].engine)
    assert ours == [*plain, "--kv-compress", "kv-compress"]
    at = plain.index("--num-gpu-blocks-override") + 1
    assert (plain[at], fp8[at]) == ("101", "401")  # float32 elements take four bytes, fp8's one
    assert fp8[-2:] == ["--kv-cache-dtype", "fp8"]


def test_a_running_server_is_asked_what_it_serves(monkeypatch):
    with fake_server("ours", "--kv-compress", "x") as server:
        server.resume()
        target = look(server.url + "/v1/", "", "", "")
        assert (target.model, target.tokenizer) == ("served", "its-folder")
        with pytest.raises(BenchFailed, match="serves served, not 'other'"):
            look(server.url, "other", "", "")
        done = run(target, LOAD, 0, {"kv_compress_rate": 4}, FAKE)
        assert (done.held_share, done.blocks_freed) == (0.25, 40)
        rows = [row for row in ROWS if row.name in (OFF, "rate 8")]
        serving = {row.name: Serving(target) for row in rows}
        samples = measure(rows, serving, [LOAD], 1, 0, {}, lambda _: None, FAKE)
    assert tables(rows, samples, LOAD, {}, 1)[0].columns[-1] == "x off"
    with pytest.raises(BenchFailed, match="no vLLM server answers"):
        look(server.url, "", "", "")


def test_a_server_without_kv_compress_is_one_clear_line():
    with fake_server() as server:
        server.resume()
        done = CliRunner().invoke(serve.app, ["--url", server.url])
        assert done.exit_code == 2
        assert "runs without --kv-compress: start it with that flag" in done.output


@pytest.mark.parametrize(
    ("options", "complaint"),
    [(["--rates", "1"], "must be above 1"), (["--goodput", "fast"], "is not as ttft:1000"),
     (["--presets", "nope"], "no preset")],
)  # fmt: skip
def test_bad_options_are_one_clear_line(options, complaint):
    done = CliRunner().invoke(serve.app, options)
    assert done.exit_code == 2 and complaint in " ".join(done.output.split())


@pytest.mark.parametrize("rates", [[float("inf")], [1.0, 4.0, float("inf")]])
def test_the_plot_is_a_picture(tmp_path, rates):
    keys = [*serve_client.KEPT, "median_ttft_ms", "median_tpot_ms"]
    runs = {name: [Run(dict.fromkeys(keys, 2.0))] * 3 for name in (PLAIN, "rate 8")}
    plot({rate: runs for rate in rates}, tmp_path / "s.png", "caption")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.engine
def test_vllm_s_own_client_and_server_fit_together():
    how = Serve(str(MODEL), 60, 256, 8, 256, "float32", eager=True)
    engine = ROWS[-1].engine
    settings = environment(1)
    settings.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    with VllmServer("ours", how.arguments(engine), settings, start_s=400) as server:
        server.resume()
        load = Load(3, 192, 8, float("inf"), goodput=("ttft:60000", "tpot:60000"))
        target = look(server.url, "", "", "")
        done = run(target, load, 0, ROWS[-1].asks)
        idle = run(target, load, 1, {"kv_compress": OFF})
    assert done["completed"] == 3 and done["total_output_tokens"] == 24
    assert done["request_goodput"] == pytest.approx(done["request_throughput"])
    assert 0 < done["median_ttft_ms"] <= done["p99_ttft_ms"]
    assert 0.1 < done.held_share < 0.5  # 192 tokens and what random text gains: 1 of 6 blocks
    assert done.blocks_freed > 0
    assert idle.held_share is None and idle.blocks_freed == 0
