"""The quality bench on a real engine and a real server, with the demo model."""

import json
import os
import re
import signal
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from vllm_kvcompress.bench.engine import MODEL
from vllm_kvcompress.bench.quality import demo
from vllm_kvcompress.bench.vllm_server import VllmServer
from vllm_kvcompress.cli import app

pytestmark = pytest.mark.engine
FORGETFUL = """
from dataclasses import dataclass

from vllm_kvcompress.policy import register_scorer
from vllm_kvcompress.policy.attention import AttentionScorer


@register_scorer("forgetful")
@dataclass(frozen=True)
class Forgetful(AttentionScorer):
    def score(self, obs, layer):
        return -super().score(obs, layer)
"""


def bench(tmp_path: Path, *arguments: str, name: str = "q") -> dict:
    path = tmp_path / f"{name}.json"
    given = ["bench", "quality", "--json", str(path), "--no-fp8", "--threads", "1", *arguments]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text()) | {"printed": result.output}


def answers(tmp_path: Path, name: str = "q") -> dict:
    lines = (tmp_path / f"{name}.answers.jsonl").read_text().splitlines()[1:]
    read = [json.loads(line) for line in lines]
    return {(a["case"], a["row"], a["unseen"]): a["text"] for a in read}


@pytest.fixture
def forgetful(tmp_path, monkeypatch) -> Path:
    """Keeps what the default preset would drop; its scorer is there for every process."""
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    info = tmp_path / "forgetful-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: forgetful\nVersion: 1.0\n")
    entry = "[vllm_kvcompress.policies]\nforgetful = forgetful\n"
    (info / "entry_points.txt").write_text(entry)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    preset = tmp_path / "forgetful.yaml"
    preset.write_text(
        "name: forgetful\nscorer: {name: forgetful}\nallocator: {name: global}\nrate: 8\n"
    )
    return preset


def test_the_same_seed_gives_the_same_table_and_the_worst_policy_is_caught(tmp_path, forgetful):
    arguments = ["--n", "8", "--lengths", "512", "--budgets", "0.5", "--question", "both"]
    arguments += ["--policies", "kv-compress", str(forgetful)]
    once = bench(tmp_path, *arguments)
    again = bench(tmp_path, *arguments, "--tasks", "needle", name="again")
    (needle,) = (one for one in again["tables"] if one["title"] == "needle, 512 tokens, n = 8")
    assert needle in once["tables"]
    assert answers(tmp_path, "again").items() <= answers(tmp_path).items()
    seen = [c for c in once["cells"] if c["unseen"] == "false"]
    score = {(c["task"], c["policy"]): float(c["score"]) for c in seen}
    for task in ("needle", "many-facts", "span"):
        assert score[task, "kv-compress"] >= 0.9 * score[task, "plain vLLM"] > 0.5
    titles = [table["title"].rpartition(", n =")[0] for table in once["tables"]]
    groups = [title for title in titles if title]
    assert len(groups) == 6  # three tasks, question seen and unseen
    for group in groups:
        judged = [v for v in once["verdicts"] if v["what"].startswith(f"{group}: forgetful")]
        assert judged and not any(v["met"] for v in judged), f"{group}: not caught"
    assert "MISSED  needle, 512 tokens: forgetful @ 0.5 of full" in once["printed"]


@pytest.fixture(scope="module")
def server():
    arguments = [str(MODEL), "--kv-compress", "--dtype", "float32", "--enforce-eager"]
    with VllmServer("server", arguments, {}) as server:
        server.resume()
        yield server


def test_a_server_answers_as_an_engine_in_process_does(server, tmp_path):
    arguments = ["--n", "4", "--lengths", "512", "--budgets", "0.125"]
    arguments += ["--policies", "kv-compress", "random", "--tasks", "demo"]
    asked = {
        "engine": ["--concurrency", "1"],
        "server": ["--url", server.url, "--concurrency", "1"],
        "crowded": ["--url", server.url, "--concurrency", "16"],
    }
    for name, how in asked.items():
        bench(tmp_path, *arguments, *how, name=name)
    engine = answers(tmp_path, "engine")
    assert len(engine) == 4 * 3 * 3
    assert answers(tmp_path, "server") == engine
    crowded = answers(tmp_path, "crowded")
    assert crowded.keys() == engine.keys()
    assert sum(crowded[key] != engine[key] for key in engine) <= 1


def test_a_prompts_file_is_answered_and_its_bad_lines_are_told(server, tmp_path):
    cases = [demo.needle(Random(i), 300) for i in range(5)]
    lines = [json.dumps({"prompt": c.prompt, "answer": c.answer[0], "task": "mine"}) for c in cases]
    lines[2:2] = ['{"prompt": "no answer"}', "not JSON"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    arguments = ["--prompts", str(path), "--policies", "kv-compress", "--budgets", "0.5"]
    done = bench(tmp_path, *arguments, "--url", server.url)
    assert [note.split(":")[1].strip() for note in done["notes"]] == ["line 3", "line 4"]
    assert "line 3" in done["printed"]
    table = done["tables"][0]
    assert table["title"] == "mine, n = 5"
    assert table["rows"][-1][-1] == "100.0"


def test_a_file_without_a_prompt_is_refused_in_one_line(tmp_path):
    (tmp_path / "none.jsonl").write_text("nothing here\n")
    result = CliRunner().invoke(
        app, ["bench", "quality", "--prompts", str(tmp_path / "none.jsonl")]
    )
    assert result.exit_code == 2 and "no case to ask" in result.stderr


def test_a_server_that_has_died_is_told_in_one_line(server, tmp_path):
    os.killpg(server._process.pid, signal.SIGKILL)
    server._process.wait()
    given = ["bench", "quality", "--url", server.url, "--json", str(tmp_path / "dead.json")]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2
    assert re.fullmatch(
        r"vllm-kvcompress bench quality: no answer from \S+: [^\n]*\n", result.stderr
    )
