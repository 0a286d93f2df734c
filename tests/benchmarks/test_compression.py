"""`bench.compression`: the parts of one compression, and what a wrong value is told."""

import json

import pytest
from typer.testing import CliRunner

from vllm_kvcompress.bench.compression import PARTS, app


def test_every_part_of_a_compression_is_timed(tmp_path):
    report = tmp_path / "compression.json"
    arguments = ["--shapes", "demo", "--tokens", "1024", "--repeats", "2", "--json", str(report)]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    (of_shape,) = json.loads(report.read_text())["samples"].values()
    (laps,) = of_shape.values()
    assert len(laps) == 2
    assert all(lap[part] > 0 for lap in laps for part in PARTS)


@pytest.mark.parametrize(
    "wrong",
    [["--preset", "none"], ["--rate", "2000"], ["--tokens", "99999999999"], ["--shapes", "huge"]],
)
def test_a_wrong_value_is_told_before_anything_is_measured(wrong, tmp_path):
    report = tmp_path / "compression.json"
    ran = CliRunner().invoke(app, [*wrong, "--json", str(report)])
    assert ran.exit_code == 2 and "Invalid value" in ran.output and not report.exists()
