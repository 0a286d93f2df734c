"""`presets` lists what there is; `verify` judges by the server's own record."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from typer.testing import CliRunner

from vllm_kvcompress.cli import app
from vllm_kvcompress.presets import shipped_presets
from vllm_kvcompress.verify import long_prompt

RECORD = {
    "request_id": "chatcmpl-2-suffix",
    "preset": "snapkv",
    "blocks_before": 63,
    "blocks_after": 9,
    "held_tokens": 276,
    "is_recompression": False,
}


def run(*argv: str):
    return CliRunner().invoke(app, [*argv], env={"COLUMNS": "160", "VLLM_API_KEY": ""})


class Server:
    """Answers as vLLM does, with the statistics that a test gives it."""

    def __init__(self, stats, chat_template=True) -> None:
        self.stats = stats and {"kernels": {}} | stats
        self.chat_template, self.asked = chat_template, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.headers.get("Authorization") != "Bearer key":
                    return self.answer(401, {"error": "Unauthorized"})
                if self.path == "/v1/models":
                    return self.answer(200, {"data": [{"id": "m", "max_model_len": 4096}]})
                return self.answer(200 if outer.stats else 404, outer.stats)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                is_chat = self.path == "/v1/chat/completions"
                if is_chat and not outer.chat_template:
                    return self.answer(400, {"error": {"message": "no chat template"}})
                outer.asked.append(body)
                number = len(outer.asked)
                choice = {"message": {"content": "7391"}} if is_chat else {"text": "7391"}
                usage = {"prompt_tokens": 2004}
                kind = "chatcmpl" if is_chat else "cmpl"
                reply = {"id": f"{kind}-{number}", "choices": [choice], "usage": usage}
                return self.answer(200, reply)

            def answer(self, status, content) -> None:
                payload = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_presets_are_listed() -> None:
    listed = run("presets")
    assert listed.exit_code == 0
    for preset in shipped_presets().values():
        assert preset.name in listed.output and preset.scorer.name in listed.output
    as_json = json.loads(run("presets", "--json").output)
    assert [one["name"] for one in as_json] == list(shipped_presets())


def test_help_teaches() -> None:
    shown = " ".join(run("--help").output.split())
    assert "vllm serve MODEL --kv-compress" in shown and "verify" in shown
    assert "Exit code 0" in " ".join(run("verify", "--help").output.split())


@pytest.mark.parametrize("chat_template", [True, False])
def test_verify_shows_what_was_freed(chat_template) -> None:
    record = RECORD if chat_template else RECORD | {"request_id": "cmpl-2-0-suffix"}
    kernels = {"attention": ["cuda", "triton"], "compaction": ["cuda"]}
    stats = {"preset": "snapkv", "recent": [record], "kernels": kernels}
    with Server(stats, chat_template) as server:
        done = run("verify", "--url", server.url, "--api-key", "key", "--rate", "4")
    assert done.exit_code == 0, done.output
    assert "63 -> 9" in done.output and "agree" in done.output and "13.8%" in done.output
    assert "attention cuda+triton, compaction cuda\n" in done.output
    off, on = (body["vllm_xargs"] for body in server.asked)
    assert off == {"kv_compress": "off"}
    assert on == {"kv_compress": "snapkv", "kv_compress_rate": 4}


def test_verify_as_json() -> None:
    with Server({"preset": "off", "recent": [RECORD]}) as server:
        done = run("verify", "--url", server.url, "--api-key", "key", "--json")
    report = json.loads(done.output)
    assert report["compressed"] and report["answers_agree"]
    assert report["held_share"] == pytest.approx(276 / 2004)
    assert server.asked[1]["vllm_xargs"]["kv_compress"] == "kv-compress"


def test_verify_says_when_nothing_was_compressed(monkeypatch) -> None:
    monkeypatch.setattr("vllm_kvcompress.verify.WAIT_S", 0.0)
    other = RECORD | {"request_id": "chatcmpl-9-other"}
    with Server({"preset": "snapkv", "recent": [other]}) as server:
        done = run("verify", "--url", server.url, "--api-key", "key")
    assert done.exit_code == 1 and "NOT COMPRESSED" in done.output


def test_verify_of_a_server_without_the_flag() -> None:
    with Server(None) as server:
        done = run("verify", "--url", server.url, "--api-key", "key")
    assert done.exit_code == 1 and "vllm serve MODEL --kv-compress" in done.output


def test_verify_without_an_answer() -> None:
    with Server({"preset": "snapkv", "recent": []}) as server:
        wrong_key = run("verify", "--url", server.url)
        no_model = run("verify", "--url", server.url, "--api-key", "key", "--model", "x")
    gone = run("verify", "--url", server.url)
    assert (wrong_key.exit_code, no_model.exit_code, gone.exit_code) == (2, 2, 2)
    assert "--api-key" in wrong_key.output
    assert "it serves: m" in no_model.output
    assert "no answer from" in gone.output
    assert run("verify", "--url", "nonsense").exit_code == 2


@pytest.mark.parametrize(("holds", "says"), [(b"\xff\xfe", "not text"), (b" \n", "no prompt")])
def test_a_file_without_a_prompt_is_told_in_one_line(holds, says, tmp_path) -> None:
    (tmp_path / "prompt.txt").write_bytes(holds)
    done = run("verify", "--prompt-file", str(tmp_path / "prompt.txt"))
    assert done.exit_code == 2 and says in done.output and done.output.count("\n") == 1


def test_what_is_no_vllm_is_told_in_one_line(monkeypatch) -> None:
    page = httpx.Response(200, text="<html>welcome</html>")
    monkeypatch.setattr(httpx.Client, "request", lambda *args, **kwargs: page)
    done = run("verify")
    assert done.exit_code == 2
    assert "/v1/models answered no JSON: it is no vLLM" in done.output


def test_the_prompt_suits_the_model() -> None:
    assert long_prompt({"id": "demo"}, 500).endswith("?")
    english = long_prompt({"id": "qwen", "root": "Qwen/Qwen3-0.6B"}, 2000)
    assert "7391" in english and english.index("7391") < len(english) / 2
    assert 1200 < len(english.split()) < 2200
