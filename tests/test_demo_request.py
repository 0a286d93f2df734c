"""The request that `make serve` writes, and the examples it prints."""

import json
import shlex
import sys

from vllm_kvcompress.bench.demo_model import request


def test_the_prompt_holds_the_answer_far_from_its_question():
    task = request.demo_task()
    asked = task.prompt.rsplit(" ", 1)[-1].rstrip("?")
    fact = f"The code of {asked} is {task.answer}"
    assert task.prompt.count(fact) == 1
    assert len(task.prompt) - task.prompt.index(fact) > len(task.prompt) / 2


def test_examples_can_be_pasted(tmp_path, monkeypatch, capsys):
    path = tmp_path / "with a space" / "request.json"
    monkeypatch.setattr(sys, "argv", ["request", "--port=8123", "--model=other", f"--out={path}"])
    request.main()
    shown = capsys.readouterr().out
    curl = next(line for line in shown.splitlines() if line.startswith("curl"))
    words = shlex.split(curl)
    assert words[-2:] == ["-d", f"@{path}"]
    assert "http://localhost:8123/v1/chat/completions" in words
    assert json.loads(path.read_text())["model"] == "other"

    python = shown.split("<<'END'\n")[1].split("END\n")[0]
    compile(python, "example", "exec")


def test_waiting_ends_with_the_process_that_started_it(monkeypatch):
    parents = iter([10, 10, 1])
    monkeypatch.setattr(request.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(request.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(request.urllib.request, "urlopen", refuse)
    assert request.wait_until_ready(1) is False


def refuse(url, timeout):
    raise OSError("connection refused")
