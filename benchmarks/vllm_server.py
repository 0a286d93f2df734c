"""A `vllm serve` in a process group of its own, which waits stopped until it is asked."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

import httpx

from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.process import GOODBYE_S, ProcessEnded

VLLM = (sys.executable, "-P", "-m", "vllm.entrypoints.cli.main")
HOST = "127.0.0.1"
POLL_S = 0.25
SPEAKER = re.compile(r"^(\([\w ]+ pid=\d+\) ?)?((ERROR|WARNING|INFO) [\d-]+ [\d:]+ \[[^]]+\] ?)?")
RELAYED = re.compile(r"Worker failed with error '(.*)', please check .*")
EFFECT = "Engine core initialization failed"  # said last, by another process than the cause's


class CannotStart(RuntimeError):
    """A server that is not there. `reason`: one line."""

    def __init__(self, name: str, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{name} does not start: {reason}")


def free_port(wanted: int = 0) -> int:
    """The wanted port if nothing listens there; 0 for any.

    Raises:
        BenchError: with one line, when it is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", error)
            raise BenchError(f"port {wanted} cannot be used: {why}") from None
        port: int = probe.getsockname()[1]
        return port


def causes(log: str) -> str:
    """A server's log without who says it, and without what only follows from an error."""
    lines = [RELAYED.sub(r"\1", SPEAKER.sub("", line)) for line in log.splitlines()]
    return "\n".join(line for line in lines if EFFECT not in line)


class VllmServer:
    """A context manager: started, healthy and stopped on entering; ended on leaving.

    Args:
        arguments: of `vllm serve`, without host and port.
        environment: over this process's own.
        command: what serves, in place of `vllm`.

    Raises:
        CannotStart: on entering: it ended, or was not healthy within `start_s` seconds.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        port: int = 0,
        start_s: float = 600,
        command: Sequence[str] = VLLM,
    ) -> None:
        self.name, self._start_s = name, start_s
        self._port = free_port(port)
        self.url = f"http://{HOST}:{self._port}"
        where = ["--host", HOST, "--port", str(self._port)]
        self._command = [*command, "serve", *arguments, *where]
        self._environment = {**os.environ, **environment}

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._wait_until_healthy()
        except BaseException:
            self._end()
            raise
        self.pause()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._end()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it work. Raises ProcessEnded."""
        self.check()
        self._signal(signal.SIGCONT)

    def check(self) -> None:
        """Raise ProcessEnded if it has died."""
        if self._process.poll() is not None:
            raise self._ended()

    def _wait_until_healthy(self) -> None:
        give_up = time.monotonic() + self._start_s
        while time.monotonic() < give_up:
            if self._process.poll() is not None:
                raise CannotStart(self.name, self._ended().reason)
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            time.sleep(POLL_S)
        raise CannotStart(self.name, f"not healthy after {self._start_s:g} s")

    def _ended(self) -> ProcessEnded:
        self._log.seek(0)
        return ProcessEnded(self.name, causes(self._log.read()))

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _end(self) -> None:
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GOODBYE_S)
        self._signal(signal.SIGKILL)  # whatever of the group is left
        self._process.wait()
        self._log.close()
