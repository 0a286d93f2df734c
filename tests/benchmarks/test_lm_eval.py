import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from vllm_kvcompress.bench.lm_eval_tasks import MAKERS, MAX_NEW_TOKENS, STOP, app
from vllm_kvcompress.bench.vllm_server import VllmServer

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs/lm-eval.md").read_text()
LM_EVAL = Path(sys.prefix).parent / ".venv-lm-eval/bin/lm-eval"
N, TOKENS = 8, 1000
SERVE = [str(ROOT / "vllm_kvcompress/demo_model"), "--kv-compress", "--enforce-eager"]
SERVE += ["--served-model-name", "demo", "--dtype", "float32"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def write(folder: Path, *arguments: str) -> None:
    result = CliRunner().invoke(app, [str(folder), *arguments])
    assert result.exit_code == 0, result.output


def prompts_of(folder: Path, name: str) -> list[dict[str, str]]:
    task = yaml.safe_load((folder / f"{name}.yaml").read_text())
    data = Path(task["dataset_kwargs"]["data_files"][task["test_split"]])
    return [json.loads(line) for line in data.read_text().splitlines()]


def test_tasks_can_be_answered_from_their_prompts_in_the_tokens_allowed(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "vllm_kvcompress/demo_model")
    write(tmp_path, "--n", str(N), "--tokens", str(TOKENS))
    for name in MAKERS:
        made = prompts_of(tmp_path, name)
        assert len({one["prompt"] for one in made}) == N
        for one in made:
            assert len(tokenizer.encode(one["prompt"], add_special_tokens=False)) == TOKENS
            answer = f" {one['answer']}"
            assert answer + STOP in one["prompt"] and not one["prompt"].endswith(answer)
            assert len(tokenizer.encode(answer + STOP, add_special_tokens=False)) <= MAX_NEW_TOKENS


def test_the_same_seed_makes_the_same_prompts(tmp_path):
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        write(tmp_path / folder, "--n", "3", "--seed", seed)
    a, b, c = ([prompts_of(tmp_path / folder, name) for name in MAKERS] for folder in "abc")
    assert a == b != c


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, [str(tmp_path / "file" / "folder")])
    assert result.exit_code == 2
    assert "cannot write" in result.stderr and len(result.stderr.splitlines()) == 1


def documented(opening: str, **changes: str) -> list[str]:
    """A command of the page, the last that begins so, as words."""
    blocks = re.findall(r"```\n(.*?)```", DOC, re.DOTALL)
    command = [block for block in blocks if block.startswith(opening)][-1]
    for old, new in changes.items():
        assert old in command
        command = command.replace(old, new)
    return shlex.split(command.replace("\\\n", " "))


@pytest.mark.engine
@pytest.mark.skipif(not LM_EVAL.exists(), reason="no lm-eval: docs/lm-eval.md says how to get it")
def test_the_documented_command_runs_compressed_against_a_real_server(tmp_path):
    folder, results = tmp_path / "tasks", tmp_path / "out"
    made = documented(".venv/bin/python", **{"results/lm-eval": str(folder), "--n 40": f"--n {N}"})
    subprocess.run([sys.executable, *made[1:]], cwd=ROOT, check=True)
    with VllmServer("server", SERVE, ENVIRONMENT) as server:
        server.resume()
        asked = documented(
            ".venv-lm-eval/bin/lm-eval",
            **{"http://localhost:8000": server.url, "results/lm-eval": str(folder)},
        )
        done = subprocess.run(
            [LM_EVAL, *asked[1:], "--output_path", results],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        stats = httpx.get(f"{server.url}/v1/kv_compress/stats").json()
    assert stats["requests"] == {"kv-compress": {"compressed": N * len(MAKERS)}}
    (file,) = results.rglob("results_*.json")
    scores = json.loads(file.read_text())["results"]
    assert set(MAKERS) <= set(scores)
    assert scores["demo_needle"]["exact_match,words"] >= 0.75
