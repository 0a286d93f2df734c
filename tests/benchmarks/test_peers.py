"""Peers: specs as typed, an environment of their own, and the talk with their process."""

import importlib.util
import json
import os
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from vllm_kvcompress.bench.peers import environment
from vllm_kvcompress.bench.peers.environment import (
    peer_python,
    stamp_of,
    torch_sources,
    why_pip_failed,
)
from vllm_kvcompress.bench.peers.errors import PeerError
from vllm_kvcompress.bench.peers.kvpress import WORKER, KVPress, PeerAsk, PeerSpec

SNAP = PeerSpec("SnapKVPress")


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("kvpress:KnormPress", {"press": "KnormPress", "press_args": {}}),
        ("kvpress: KnormPress()", {"press": "KnormPress", "press_args": {}}),
        (
            "kvpress:SnapKVPress(window_size=16, kernel_size=21)",
            {"press": "SnapKVPress", "press_args": {"window_size": 16, "kernel_size": 21}},
        ),
        (
            "kvpress:AdaKVPress(press=SnapKVPress(kernel_size=21),alpha_safeguard=0.5)",
            {
                "press": "AdaKVPress",
                "press_args": {
                    "press": {"press": "SnapKVPress", "press_args": {"kernel_size": 21}},
                    "alpha_safeguard": 0.5,
                },
            },
        ),
        (
            "kvpress:KnormPress(a=True,b=None,c=-3,d='x')",
            {"press": "KnormPress", "press_args": {"a": True, "b": None, "c": -3, "d": "x"}},
        ),
    ],
)
def test_a_spec_says_what_it_says(text, request_):
    spec = PeerSpec.parse(text)
    assert spec.request() == request_
    assert json.loads(json.dumps(request_)) == request_
    assert PeerSpec.parse(str(spec)) == spec
    assert " " not in str(spec)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SnapKVPress",
        "other:SnapKVPress",
        "kvpress:",
        "kvpress:SnapKVPress(",
        "kvpress:SnapKVPress(16)",
        "kvpress:SnapKVPress(window_size)",
        "kvpress:SnapKVPress(**{'window_size': 16})",
        "kvpress:SnapKVPress(window_size=16,window_size=32)",
        "kvpress:SnapKVPress(window_size=[1])",
        "kvpress:SnapKVPress(window_size=2**9)",
        "kvpress:a.b(c=1)",
        "kvpress:f()()",
        "kvpress:" + "(" * 400,
        "kvpress:" + "A" * 600,
    ],
)
def test_a_bad_spec_is_told_the_form(text):
    with pytest.raises(ValueError, match=r"write kvpress:PRESS or kvpress:PRESS\(name=value"):
        PeerSpec.parse(text)


def test_a_spec_runs_nothing(tmp_path):
    with pytest.raises(ValueError, match="is no peer"):
        PeerSpec.parse(f"kvpress:A(b=open({str(tmp_path / 'made')!r}, 'w'))")
    assert not list(tmp_path.iterdir())


def test_the_budget_is_not_the_spec_s_to_set():
    with pytest.raises(ValueError, match="set compression_ratio"):
        PeerSpec.parse("kvpress:AdaKVPress(press=SnapKVPress(compression_ratio=0.5))")


@pytest.mark.parametrize("numbers", [(0, 1, 0), (1, 0, 0), (1, 1, 3), (1, 1, -1)])
def test_an_ask_that_cannot_be_is_refused(numbers):
    max_tokens, kept, question = numbers
    with pytest.raises(ValueError, match="tokens"):
        PeerAsk("a", SNAP, [1, 2, 3], max_tokens, kept, question)


# The environment


def test_a_stamp_changes_with_lock_and_torch(tmp_path):
    lock = tmp_path / "peer.lock"
    lock.write_text("a==1\n")
    first = stamp_of(lock, "2.13.0+cpu")
    assert stamp_of(lock, "2.13.0+cpu") == first
    assert stamp_of(lock, "2.13.0") != first
    lock.write_text("a==2\n")
    assert stamp_of(lock, "2.13.0+cpu") != first


def test_torch_is_of_our_build():
    index = "https://download.pytorch.org/whl"
    cpu = ["torch==2.13.0+cpu", "--no-deps"]
    assert torch_sources("2.13.0+cpu") == [cpu, [*cpu, "--index-url", f"{index}/cpu"]]
    cuda = ["torch==2.13.0+cu130"]
    assert torch_sources("2.13.0+cu130") == [cuda, [*cuda, "--index-url", f"{index}/cu130"]]
    assert torch_sources("2.13.0") == [["torch==2.13.0"]]


def test_the_lock_is_exact_and_leaves_torch_out():
    lines = Path(environment.__file__).with_name("kvpress.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins["kvpress"] == "0.5.5"
    assert tuple(map(int, pins["transformers"].split("."))) < (5, 3)
    assert not [name for name in pins if name.startswith(("torch", "nvidia", "cuda"))]


def test_only_known_peers_have_an_environment(tmp_path):
    with pytest.raises(PeerError, match=r"no peer is called 'other'; there is kvpress"):
        peer_python("other", print, tmp_path)


def test_an_interrupted_environment_is_made_anew_and_a_whole_one_kept(tmp_path, monkeypatch):
    venv, made = tmp_path / "venv", []

    def interrupted(venv, *rest):
        environment._clear(venv)
        venv.mkdir()
        (venv / environment.STAMP).touch()
        (venv / "half").touch()
        raise KeyboardInterrupt

    def whole(venv, *rest):
        environment._clear(venv)
        venv.mkdir()
        made.append(sorted(path.name for path in venv.iterdir()))

    monkeypatch.setattr(environment, "_make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        peer_python("kvpress", print, venv)
    monkeypatch.setattr(environment, "_make", whole)
    for _ in range(3):
        assert peer_python("kvpress", print, venv) == venv / "bin/python"
    assert made == [[]]
    monkeypatch.setattr(environment, "version", lambda name: "2.14.0+cpu")
    peer_python("kvpress", print, venv)
    assert len(made) == 2


def test_what_somebody_else_put_there_stays(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(PeerError, match="is not an environment of the bench"):
        peer_python("kvpress", print, tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda _: usage(9, 9, 3 * 10**8))
    with pytest.raises(PeerError, match=r"has 0\.3 GB free and 2 GB are needed"):
        peer_python("kvpress", print, tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_without_a_network_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setattr(environment, "PYTORCH_INDEX", "http://127.0.0.1:9/whl")
    said = []
    with pytest.raises(PeerError) as caught:
        peer_python("kvpress", said.append, tmp_path / "venv")
    assert "the package index cannot be reached" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert any("torch" in line for line in said)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (["Collecting a", "ERROR: Could not install: [Errno 28] No space left on device"], "full"),
        (
            ["WARNING: Retrying after 'NewConnectionError(...)'", "ERROR: none"],
            "is there a network",
        ),
        (["Collecting a", "ERROR: No matching distribution for a==9"], "No matching distribution"),
        (["Traceback", "MemoryError"], "MemoryError"),
        ([], "no reason given"),
    ],
)
def test_pip_s_failure_is_one_line(lines, why):
    assert why in why_pip_failed(lines) and "\n" not in why_pip_failed(lines)


# The talk with the worker, played by a script

FAKE = """
import json, os, sys
opening = json.loads(sys.stdin.readline())
print("chatter of a library", file=sys.stderr)
if opening["model"] == "missing":
    raise OSError("missing is not a local folder")
ready = {"presses": ["SnapKVPress"], "versions": {"kvpress": "0.5.5"}, "device": "cpu"}
print(json.dumps(ready), flush=True)
for line in sys.stdin:
    case = json.loads(line)
    answer = {"id": case["id"]}
    if "check" in case:
        if case["check"]["press"] != "SnapKVPress":
            answer["error"] = "kvpress has no such press; it knows SnapKVPress"
    elif case["max_tokens"] == 13:
        os.kill(os.getpid(), 9)
    elif case["max_tokens"] == 14:
        raise RuntimeError("out of ideas")
    elif case["max_tokens"] == 15:
        answer["error"] = "the window is longer than the prompt"
    else:
        answer |= {"token_ids": case["prompt_ids"][::-1], "text": "x", "kept_tokens": 1.5}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def fake(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(FAKE)
    return lambda model="m": KVPress(Path(sys.executable), model, "float32", 1, worker)


def ask(key: str, max_tokens: int = 4) -> PeerAsk:
    return PeerAsk(key, SNAP, [1, 2, 3], max_tokens, kept_tokens=2)


def test_answers_come_in_order_with_the_key_of_their_ask(fake):
    with fake() as peer:
        answers = list(peer.answers([ask("b"), ask("a", 15), ask("c")]))
        assert peer.presses == ("SnapKVPress",) and peer.versions == {"kvpress": "0.5.5"}
    assert [answer.key for answer in answers] == ["b", "a", "c"]
    assert answers[0].token_ids == (3, 2, 1) and answers[0].kept_tokens == 1.5
    assert answers[1].error == "the window is longer than the prompt"
    assert answers[1].kept_tokens is None
    assert answers[2].error is None


def test_a_press_is_checked_before_anything_is_asked(fake):
    with fake() as peer:
        peer.check(SNAP)
        with pytest.raises(ValueError, match=r"kvpress:Nope: .* it knows SnapKVPress"):
            peer.check(PeerSpec("Nope"))


@pytest.mark.parametrize("max_tokens", [13, 14])
def test_a_dying_worker_ends_in_one_error_with_its_last_words(fake, max_tokens):
    with fake() as peer, pytest.raises(PeerError, match="kvpress has ended") as caught:
        list(peer.answers([ask("a"), ask("b", max_tokens)]))
    assert "\n" not in str(caught.value)
    assert ("out of ideas" in str(caught.value)) == (max_tokens == 14)


def test_a_worker_that_cannot_open_the_model_says_why(fake):
    with pytest.raises(PeerError, match="missing is not a local folder"), fake("missing"):
        pass


def test_a_python_that_is_not_there_is_one_line(tmp_path):
    with (
        pytest.raises(PeerError, match="cannot start: No such file"),
        KVPress(tmp_path / "python", "m", "float32", 1),
    ):
        pass


# What the worker computes by itself


@pytest.fixture(scope="module")
def worker_module():
    spec = importlib.util.spec_from_file_location("kvpress_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kvpress_worker"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["kvpress_worker"]


@pytest.mark.parametrize(
    ("holds", "kept", "held", "most_attempts"),
    [
        (lambda target: float(target), 125, 125, 1),
        (lambda target: target // 20 * 20.0, 125, 120, 12),  # chunks
        (lambda target: target + 0.3125, 125, 124.3125, 2),  # a float's rounding
        (lambda target: max(64.0, target - 7), 125, 125, 3),  # never less than its window
        (lambda target: target * 0.5, 125, 125, 14),
        (lambda target: min(1000.0, target * 3.0), 125, 123, 14),
    ],
)
def test_a_press_is_driven_to_the_most_that_fits(worker_module, holds, kept, held, most_attempts):
    attempts = []

    def attempt(target):
        attempts.append(target)
        return worker_module.Compressed(None, holds(target), ())

    assert worker_module.closest(attempt, kept, 1000).held == held
    assert len(attempts) <= most_attempts and len(set(attempts)) == len(attempts)
    assert all(1 <= target < 1000 for target in attempts)


def test_a_press_that_keeps_too_much_at_any_ratio_is_an_error(worker_module):
    def attempt(target):
        return worker_module.Compressed(None, 1000.0, ())

    with pytest.raises(ValueError, match="holds 1000 of 1000 tokens at any ratio; 125 were"):
        worker_module.closest(attempt, 125, 1000)
