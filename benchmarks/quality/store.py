"""Outcomes on disk, a line each, so that an interrupted run goes on where it stopped."""

import fcntl
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.quality.rows import Outcome


class Store:
    """A file of outcomes under a first line that says what they are outcomes of.

    Args:
        subject: what must be equal for old outcomes to count: model, block size and so on.
        fresh: drop what is there.

    Raises:
        BenchError: on entering, when the file cannot be used or is about something else.
    """

    def __init__(self, path: Path, subject: Mapping[str, Any], fresh: bool = False) -> None:
        self.path, self._subject, self._fresh = path, dict(subject), fresh
        self.outcomes: dict[tuple[str, str, bool], Outcome] = {}

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
            self._claim()
            whole = self._read()
            self._file.truncate(whole)
        except OSError as error:
            raise BenchError(f"cannot use {self.path}: {error.strerror}") from None
        if not whole:
            self._write(self._subject)
        return self

    def __exit__(self, *raised: Any) -> None:
        with suppress(OSError):  # said when it was written
            self._file.close()

    def add(self, outcome: Outcome) -> None:
        """Raises BenchError when the disk takes no more; what is there stays readable."""
        self._write(asdict(outcome))
        self.outcomes[outcome.key] = outcome

    def _write(self, record: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise BenchError(
                f"cannot write {self.path}: {error.strerror}; "
                f"{len(self.outcomes)} answers are kept, the same command goes on from there"
            ) from None

    def _claim(self) -> None:
        """Two runs that write to one file would spoil it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BenchError(f"another run is writing to {self.path}") from None

    def _read(self) -> int:
        """Take in every whole line; returns where the last of them ends."""
        if self._fresh:
            return 0
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].splitlines()
        try:
            records = [json.loads(line) for line in lines]
            subject = records[0] if records else self._subject
            outcomes = [Outcome(**record) for record in records[1:]]
        except (ValueError, TypeError):
            raise BenchError(
                f"{self.path} is no file of outcomes: name another, or drop it with --fresh"
            ) from None
        if differing := [k for k, v in self._subject.items() if subject.get(k) != v]:
            was, now = ({k: d.get(k) for k in differing} for d in (subject, self._subject))
            raise BenchError(
                f"{self.path} holds answers of {was}, not of {now}: "
                "name another file, or drop it with --fresh"
            )
        self.outcomes = {outcome.key: outcome for outcome in outcomes}
        return whole
