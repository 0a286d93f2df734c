"""The page is short, and what it tells to type works."""

import re
import runpy
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from vllm_kvcompress.policy import registry

PAGE = Path(__file__).parents[2] / "docs" / "add-a-policy.md"
FENCE = re.compile(r"^ *```(?:python|yaml|toml) (\S+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def files_of_the_page() -> dict[str, str]:
    return {name: textwrap.dedent(body) for name, body in FENCE.findall(PAGE.read_text())}


def test_at_most_six_steps() -> None:
    steps = re.findall(r"^(\d)\. ", PAGE.read_text(), re.MULTILINE)
    assert steps == [str(i + 1) for i in range(len(steps))] and 3 <= len(steps) <= 6


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = files_of_the_page()
    assert set(files) == {"my_policy.py", "key-norm.yaml", "try_it.py", "pyproject.toml"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_scorers", dict(registry._scorers))
    try:
        runpy.run_path(str(tmp_path / "try_it.py"))
    finally:
        sys.modules.pop("my_policy", None)
    assert "256 tokens kept" in capsys.readouterr().out
    groups = tomllib.loads(files["pyproject.toml"])["project"]["entry-points"]
    assert groups == {registry.ENTRY_POINT_GROUP: {"my-policies": "my_policy"}}
