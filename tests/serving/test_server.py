"""A real `vllm serve --kv-compress`, asked by the real `openai` client."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from types import SimpleNamespace

import httpx
import openai
import pytest
from typer.testing import CliRunner

from vllm_kvcompress.accounting import held_share, plan
from vllm_kvcompress.bench.demo_model.language import needle_task
from vllm_kvcompress.cli import app
from vllm_kvcompress.presets import shipped_presets

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

VLLM = Path(sys.executable).parent / "vllm"
KEY = "sk-test"
BLOCK_TOKENS = 32
MAX_MODEL_LEN = 4096
START_S = 200
NOVEL = "x" * 100_000


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("served") / "demo_model"
    shutil.copytree("vllm_kvcompress/demo_model", path)
    return path


@pytest.fixture(scope="module")
def server(model, engine_environment, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.log"
    command = [VLLM, "serve", model, "--kv-compress", "snapkv", "--served-model-name", "demo"]
    command += ["--port", port, "--api-key", KEY, "--max-model-len", MAX_MODEL_LEN]
    command += ["--max-num-seqs", 64, "--enforce-eager"]
    command += ["--kv-compress-store", tmp_path_factory.mktemp("store")]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(part) for part in command],
            env=engine_environment | {"VLLM_SERVER_DEV_MODE": "1"},  # for /reset_prefix_cache
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url, log)
        yield SimpleNamespace(url=url, process=process, log=log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_until_ready(process, url, log) -> None:
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up:
        if process.poll() is not None:
            pytest.fail(f"the server ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            if httpx.get(f"{url}/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    pytest.fail(f"the server is not ready after {START_S} s:\n{log.read_text()[-4000:]}")


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def stats(server):
    def read() -> dict:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.get(f"{server.url}/v1/kv_compress/stats", headers=headers).json()

    return read


def chat(client, tokens=600, seed=0, **xargs):
    prompt = needle_task(Random(seed), tokens, 0.4).prompt
    return client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": prompt}],
        max_tokens=4,
        temperature=0,
        extra_body={"vllm_xargs": xargs} if xargs else None,
    )


def record_of(stats, answer_id: str) -> dict | None:
    """The server's record of a request, which may come a moment after its answer."""
    for _ in range(20):
        for record in stats()["recent"]:
            if answer_id in record["request_id"]:  # n > 1: `0_` stands before
                return record
        time.sleep(0.1)
    return None


def check_record(record: dict, prompt_tokens: int, **changes) -> None:
    """Compare a record with the arithmetic of `accounting`."""
    settings = shipped_presets()[record["preset"]].settings(**changes)
    expected = plan(prompt_tokens, BLOCK_TOKENS, 10_000, settings)
    share = held_share(expected)
    assert record["prompt_tokens"] == prompt_tokens
    assert record["held_tokens"] == pytest.approx(share * prompt_tokens)
    assert record["blocks_after"] == expected.blocks_held(prompt_tokens)
    assert record["blocks_before"] == -(-prompt_tokens // BLOCK_TOKENS)


@pytest.mark.parametrize(
    ("xargs", "preset", "changes"),
    [
        ({}, "snapkv", {}),
        ({"kv_compress_rate": 4}, "snapkv", {"rate": 4.0}),
        ({"kv_compress_rate": 2.5, "other": "x"}, "snapkv", {"rate": 2.5}),
        ({"kv_compress_budget": 200}, "snapkv", {"budget_tokens": 200}),
        ({"kv_compress": "kv-compress"}, "kv-compress", {}),
        ({"kv_compress": "streaming-llm", "kv_compress_rate": 16}, "streaming-llm", {"rate": 16.0}),
    ],
)
def test_knobs_take_effect(client, stats, xargs, preset, changes) -> None:
    answer = chat(client, **xargs)
    record = record_of(stats, answer.id)
    assert record is not None and record["preset"] == preset
    check_record(record, answer.usage.prompt_tokens, **changes)


@pytest.mark.parametrize(
    "xargs", [{"kv_compress": "off"}, {"kv_compress_rate": 1}, {"kv_compress_budget": 4096}]
)
def test_requests_left_alone(client, stats, xargs) -> None:
    answer = chat(client, **xargs)
    assert answer.usage.completion_tokens
    assert not any(one["request_id"].startswith(answer.id) for one in stats()["recent"])


def test_completions_and_several_prompts(client, stats) -> None:
    prompts = [needle_task(Random(i), 500, 0.5, form="plain").prompt for i in range(2)]
    answer = client.completions.create(
        model="demo",
        prompt=prompts,
        max_tokens=4,
        n=2,
        temperature=0.5,
        extra_body={"vllm_xargs": {"kv_compress_rate": 5}},
    )
    assert len(answer.choices) == 4
    record = record_of(stats, answer.id)
    check_record(record, record["prompt_tokens"], rate=5.0)
    assert sum(answer.id in one["request_id"] for one in stats()["recent"]) == 4


def test_streaming(client, stats) -> None:
    prompt = needle_task(Random(3), 500, 0.5).prompt
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": prompt}],
        max_tokens=4,
        temperature=0,
        stream=True,
        extra_body={"vllm_xargs": {"kv_compress_budget": 100}},
    )
    chunks = list(stream)
    record = record_of(stats, chunks[0].id)
    check_record(record, record["prompt_tokens"], budget_tokens=100)
    plain = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": prompt}],
        max_tokens=4,
        temperature=0,
        extra_body={"vllm_xargs": {"kv_compress_budget": 100}},
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content


BAD = {
    "unknown preset": ('{"kv_compress": "nope"}', "kv_compress", "'nope'; known: off"),
    "preset as a number": ('{"kv_compress": 8}', "kv_compress", "8; known: off"),
    "preset as a list": ('{"kv_compress": ["snapkv"]}', "kv_compress", "known: off"),
    "preset true": ('{"kv_compress": true}', "kv_compress", "known: off"),
    "preset of 100 KB": (f'{{"kv_compress": "{NOVEL}"}}', "kv_compress", "100000 characters"),
    "numeric string": ('{"kv_compress_rate": "8"}', "kv_compress_rate", "'8' is not allowed"),
    "rate as a list": ('{"kv_compress_rate": [8]}', "kv_compress_rate", "from 1"),
    "NaN": ('{"kv_compress_rate": NaN}', "kv_compress_rate", "nan is not allowed"),
    "infinity": ('{"kv_compress_rate": Infinity}', "kv_compress_rate", "to 1024"),
    "overflow": ('{"kv_compress_rate": 1e999}', "kv_compress_rate", "to 1024"),
    "rate 0": ('{"kv_compress_rate": 0}', "kv_compress_rate", "from 1"),
    "rate too high": ('{"kv_compress_rate": 1025}', "kv_compress_rate", "to 1024"),
    "budget too high": ('{"kv_compress_budget": 4097}', "kv_compress_budget", "from 1 to 4096"),
    "budget fractional": ('{"kv_compress_budget": 1.5}', "kv_compress_budget", "whole number"),
    "question negative": ('{"kv_compress_question": -1}', "kv_compress_question", "from 0"),
    "budget minus infinite": ('{"kv_compress_budget": -1e999}', "kv_compress_budget", "to 4096"),
    "both": (
        '{"kv_compress_rate": 8, "kv_compress_budget": 9}',
        "kv_compress_rate",
        "exclude each other",
    ),
    "unknown knob": ('{"kv_compress_ratio": 8}', "kv_compress_ratio", "known: kv_compress,"),
    "unknown task": (
        '{"kv_compress": "windowkv", "kv_compress_task": "qa"}',
        "kv_compress_task",
        "localization, aggregation, auto",
    ),
    "task as a number": ('{"kv_compress": "windowkv", "kv_compress_task": 1}', "task", "auto"),
    "tsp_rate of a request": (
        '{"kv_compress": "tsp", "kv_compress_tsp_rate": 0}',
        "kv_compress_tsp_rate",
        "known: kv_compress,",
    ),
    "task of a preset without": ('{"kv_compress_task": "auto"}', "kv_compress_task", "windowkv"),
    "knob of 100 KB": (f'{{"kv_compress_{NOVEL}": 8}}', "kv_compress_x", "100012 characters"),
    "store's level": ('{"cachegen_level": 9}', "cachegen_level", "9 is not allowed: give a whole"),
    "store's level as text": ('{"cachegen_level": "2"}', "cachegen_level", "'2' is not allowed"),
    "store's target": ('{"cachegen_ttft_ms": 0}', "cachegen_ttft_ms", "above 0, up to 3600000"),
    "level and target": (
        '{"cachegen_level": 2, "cachegen_ttft_ms": 9}',
        "cachegen_level",
        "exclude each other",
    ),
    "unknown knob of the store": ('{"cachegen_speed": 2}', "cachegen_speed", "known: cachegen_"),
}


@pytest.mark.parametrize(("xargs", "key", "says"), BAD.values(), ids=BAD.keys())
def test_a_bad_knob_is_a_400(server, xargs, key, says) -> None:
    bodies = {
        "/v1/chat/completions": '"messages": [{"role": "user", "content": "hi"}]',
        "/v1/completions": '"prompt": "hi"',
    }
    for path, prompt in bodies.items():
        for more in ("", ', "stream": true', ', "n": 2, "temperature": 1'):
            response = httpx.post(
                server.url + path,
                content=f'{{"model": "demo", {prompt}{more}, "vllm_xargs": {xargs}}}',
                headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
            )
            assert response.status_code == 400, response.text[:500]
            message = response.json()["error"]["message"]
            assert key in message and says in message and len(message) < 600


def test_requests_choose_among_all_presets_of_one_server(client) -> None:
    asked = [
        {"kv_compress": "fastkv"},
        {"kv_compress": "tsp"},
        {"kv_compress": "windowkv", "kv_compress_task": "localization"},
        {"kv_compress": "windowkv"},
        {"kv_compress": "fastkv-constant"},
        {"kv_compress": "snapkv"},
    ]
    for xargs in asked:
        said = chat(client, tokens=600, **xargs)
        assert said.choices[0].message.content is not None


@pytest.mark.parametrize("preset", ["tsp", "fastkv", "fastkv-constant", "windowkv", "snapkv"])
def test_prompts_shorter_than_windows_and_questions_are_answered(client, preset) -> None:
    """The windows have 8 to 32 tokens, the prompts 1 to 40."""
    for prompt in ([20], list(range(20, 27)), list(range(20, 60))):
        for question in (0, 7, 4096):
            answer = client.completions.create(
                model="demo",
                prompt=prompt,
                max_tokens=3,
                temperature=0,
                extra_body={
                    "ignore_eos": True,
                    "vllm_xargs": {"kv_compress": preset, "kv_compress_question": question},
                },
            )
            assert answer.usage.completion_tokens == 3


def test_prompt_logprobs_of_a_propagated_prompt_are_a_400(client) -> None:
    def ask(preset):
        return client.completions.create(
            model="demo",
            prompt="The code of",
            max_tokens=1,
            extra_body={"prompt_logprobs": 0, "vllm_xargs": {"kv_compress": preset}},
        )

    with pytest.raises(openai.BadRequestError, match="prompt_logprobs=0 is not allowed"):
        ask("tsp")
    assert ask("snapkv").choices


@pytest.mark.parametrize("value", [None, {"a": 1}])
def test_null_and_objects_are_vllms_own_400(client, value) -> None:
    with pytest.raises(openai.BadRequestError, match="validation errors"):
        chat(client, tokens=64, kv_compress=value)


def test_the_client_sees_the_reason(client) -> None:
    with pytest.raises(openai.BadRequestError, match="kv_compress_rate=5000 is not allowed"):
        chat(client, tokens=64, kv_compress_rate=5000)


def test_a_beam_search_takes_no_knobs(client) -> None:
    def beams(**xargs):
        return client.completions.create(
            model="demo",
            prompt="The code of",
            n=2,
            temperature=1,
            max_tokens=2,
            extra_body={"use_beam_search": True, "vllm_xargs": xargs},
        )

    with pytest.raises(openai.BadRequestError, match="no effect on a beam search"):
        beams(kv_compress="off")
    assert len(beams(other=1).choices) == 2


def test_32_at_once_and_the_figures_add_up(server, client, stats) -> None:
    knobs = [
        {"kv_compress": "off"},
        {"kv_compress_rate": 4},
        {"kv_compress_budget": 96},
        {"kv_compress": "kv-compress-continual", "kv_compress_rate": 8},
        {"kv_compress": "adakv"},
        {"kv_compress_rate": "bad"},
        {"kv_compress_rate": 1},
        {},
    ]
    before, metrics_before = stats(), metrics(server)

    def ask(i: int):
        try:
            return chat(client, tokens=300 + 20 * i, seed=i, **knobs[i % len(knobs)])
        except openai.BadRequestError:
            return None

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(32)))
    assert [i % 8 for i, answer in enumerate(answers) if answer is None] == [5] * 4
    assert record_of(stats, answers[31].id)
    wait_for_requests(stats, before, 28)

    after, metrics_after = stats(), metrics(server)
    compressed = [i for i in range(32) if i % 8 in (1, 2, 3, 4, 7)]
    prompt_tokens = held_tokens = 0
    for i in compressed:
        n = answers[i].usage.prompt_tokens
        record = record_of(stats, answers[i].id)
        prompt_tokens += n
        held_tokens += held_by_hand(n, i % 8)
        assert record["held_tokens"] == held_by_hand(n, i % 8)
    for name, total in (("prompt_tokens", prompt_tokens), ("held_tokens", held_tokens)):
        assert sum(after[name].values()) - sum(before[name].values()) == total
        name = f"vllm:kv_compress_{name}_total"
        assert summed(metrics_after, name) - summed(metrics_before, name) == total
    grown = {
        (policy, outcome): count - before["requests"].get(policy, {}).get(outcome, 0)
        for policy, outcomes in after["requests"].items()
        for outcome, count in outcomes.items()
    }
    assert grown["off", "off"] == 4
    assert grown["snapkv", "left_alone"] == 4
    assert grown["snapkv", "compressed"] == 12
    assert grown["kv-compress-continual", "compressed"] == grown["adakv", "compressed"] == 4
    requests = "vllm:kv_compress_requests_total"
    assert summed(metrics_after, requests) - summed(metrics_before, requests) == 28
    refused = 'vllm:kv_compress_refusals_total{model_name="demo",reason="bad_rate"}'
    assert metrics_after[refused] - metrics_before[refused] == 4


def held_by_hand(n: int, kind: int) -> int:
    """`K*B + t` of section 1 of the design, written out again."""
    budget = {1: n / 4, 2: 96, 3: n / 8, 4: n / 8, 7: n / 8}[kind]
    tail = n % BLOCK_TOKENS
    preset = {3: "kv-compress-continual", 4: "adakv"}.get(kind, "snapkv")
    own = shipped_presets()[preset]
    recent = own.recent_tokens if own.continual else max(0, own.recent_tokens - tail)
    protected = -(-(own.sink_tokens + recent) // BLOCK_TOKENS)
    wanted = -((tail - budget) // BLOCK_TOKENS)
    return int(max(1, protected, wanted)) * BLOCK_TOKENS + tail


def wait_for_requests(stats, before, count) -> None:
    def ended(figures) -> int:
        return sum(sum(outcomes.values()) for outcomes in figures["requests"].values())

    for _ in range(50):
        if ended(stats()) - ended(before) >= count:
            return
        time.sleep(0.1)
    pytest.fail(f"{ended(stats()) - ended(before)} requests ended, not {count}")


def metrics(server, prefix: str = "vllm:kv_compress_") -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith(prefix)]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def summed(values: dict[str, float], name: str) -> float:
    return sum(value for key, value in values.items() if key.split("{")[0] == name)


def test_every_series_is_there(server, stats) -> None:
    names = {re.split(r"[{]", key)[0].removeprefix("vllm:kv_compress_") for key in metrics(server)}
    assert names >= {
        "requests_total",
        "prompt_tokens_total",
        "held_tokens_total",
        "pages_freed_total",
        "blocks_freed_total",
        "compression_seconds_bucket",
        "recompressions_total",
        "refusals_total",
        "kernels_info",
    }
    values = metrics(server)
    figures = stats()
    assert summed(values, "vllm:kv_compress_blocks_freed_total") == figures["blocks_freed"] > 0
    pages = summed(values, "vllm:kv_compress_pages_freed_total")
    config = json.loads(Path("vllm_kvcompress/demo_model/config.json").read_text())
    pages_per_block = config["num_hidden_layers"] * config["num_key_value_heads"]
    assert pages == figures["pages_freed"] == figures["blocks_freed"] * pages_per_block


def test_a_prompt_comes_back_from_the_store_and_is_compressed_the_same(server, client, stats):
    def counted(name: str) -> float:
        chat(client, tokens=64, seed=98, kv_compress="off")  # figures come with steps
        return summed(metrics(server, "vllm:cachegen_"), f"vllm:cachegen_{name}")

    before = counted("stored_chunks_total")
    said = chat(client, tokens=1500, seed=99)
    chunks = said.usage.prompt_tokens // 256
    for _ in range(200):
        if counted("stored_chunks_total") >= before + chunks:
            break
        time.sleep(0.05)
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(f"{server.url}/reset_prefix_cache", headers=headers).is_success
    hits = counted("hit_tokens_total")
    again = chat(client, tokens=1500, seed=99, cachegen_level=2)
    assert again.choices[0].message.content == said.choices[0].message.content
    assert counted("hit_tokens_total") - hits > 1000
    assert counted("saves_queued") == counted("loads_in_flight") == 0
    first, second = (record_of(stats, answer.id) for answer in (said, again))
    same = ("prompt_tokens", "blocks_before", "blocks_after", "held_tokens", "preset")
    assert [first[key] for key in same] == [second[key] for key in same]
    timeline = stats()["cachegen_timelines"][-1]
    assert again.id in timeline["request_id"] and timeline["target_ms"] is None
    assert timeline["first_token_ms"] > 0
    assert sum(mark["event"] == "decode" for mark in timeline["marks"]) >= 4


def test_the_figures_need_the_key(server, stats) -> None:
    assert (stats()["preset"], stats()["block_tokens"]) == ("snapkv", BLOCK_TOKENS)
    assert httpx.get(f"{server.url}/v1/kv_compress/stats").status_code == 401
    assert httpx.get(f"{server.url}/v1/models").status_code == 401


def verify(server, *argv: str):
    argv = ("verify", "--url", server.url, "--api-key", KEY, *argv)
    return CliRunner().invoke(app, [*argv])


def test_verify_proves_compression(server) -> None:
    done = verify(server, "--tokens", "1000", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    n = report["prompt_tokens"]
    expected = plan(n, BLOCK_TOKENS, 10_000, shipped_presets()["snapkv"].settings(rate=8.0))
    assert report["blocks_before"] == -(-n // BLOCK_TOKENS)
    assert report["blocks_after"] == expected.blocks_held(n)
    assert report["held_share"] == pytest.approx(held_share(expected))
    assert report["kernels"] == {"attention": ["cpu"], "compaction": ["cpu"]}


def test_verify_fails_when_nothing_can_be_freed(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("vllm_kvcompress.verify.WAIT_S", 0.5)
    short = tmp_path / "short.txt"
    short.write_text("What is the code of amber?")
    done = verify(server, "--prompt-file", str(short))
    assert done.exit_code == 1 and "NOT COMPRESSED" in done.output


def test_the_engine_is_still_alive(server, client) -> None:
    assert chat(client).choices[0].message.content
    assert server.process.poll() is None
    lines = server.log.read_text().splitlines()
    # In its development mode vLLM tells of malformed bodies with a traceback.
    assert not [line for line in lines if "Traceback" in line and "[validation.py:" not in line]


def test_help_and_refusal_of_the_real_command(model, engine_environment) -> None:
    def started(*argv: str) -> subprocess.Popen:
        return subprocess.Popen(
            [str(VLLM), "serve", *argv],
            env=engine_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    helping = started("--help=KV-Compress")
    refused = started(str(model), "--kv-compress", "--worker-cls", "my.Worker")
    shown, _ = helping.communicate(timeout=120)
    assert helping.returncode == 0
    assert "--kv-compress [PRESET|FILE.yaml]" in shown and "--kv-compress-config JSON" in shown
    _, complaint = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert "Traceback" not in complaint
    (line,) = [line for line in complaint.splitlines() if "kvcompress" in line]
    assert line.startswith("vllm-kvcompress: error: kv-compress does not work with a worker class")
