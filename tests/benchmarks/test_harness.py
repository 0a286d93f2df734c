import json

import pytest

from vllm_kvcompress.bench.harness import (
    Summary,
    Verdict,
    command_line,
    cpu_model,
    paired_ratio,
    write_report,
)
from vllm_kvcompress.bench.options import repeat_options


def test_summary_is_median_and_range():
    assert Summary.of([5.0, 1.0, 9.0]) == Summary(5.0, 1.0, 9.0)
    with pytest.raises(ValueError, match="no samples"):
        Summary.of([])


def test_a_slow_round_cancels_out_of_a_paired_ratio():
    plain = [100.0, 20.0, 100.0]  # the second round was disturbed
    ours = [300.0, 60.0, 300.0]
    assert paired_ratio(ours, plain) == Summary(3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="2 rounds against 3"):
        paired_ratio(ours[:2], plain)


@pytest.mark.parametrize(
    ("median", "target", "at_most", "met"),
    [(1.6, 1.5, False, True), (1.4, 1.5, False, False), (0.02, 0.03, True, True),
     (0.06, 0.03, True, False), (float("nan"), 1.0, False, False)],
)  # fmt: skip
def test_a_verdict_holds_a_number_against_its_target(median, target, at_most, met):
    verdict = Verdict("it", Summary(median, median, median), target, at_most)
    assert verdict.met == met
    assert verdict.text().startswith("met" if met else "MISSED")


def test_a_missed_target_says_by_how_much():
    missed = Verdict("decode", Summary(1.2, 1.1, 1.3), 3.0)
    assert "60% below" in missed.text()
    above = Verdict("share", Summary(0.06, 0.06, 0.06), 0.03, at_most=True)
    assert "100% above" in above.text()


def test_an_option_takes_several_values_in_a_row():
    given = ["--rates", "1", "8", "--json", "a.json", "--threads", "2", "--rates", "4"]
    expected = [
        "--rates",
        "1",
        "--rates",
        "8",
        "--json",
        "a.json",
        "--threads",
        "2",
        "--rates",
        "4",
    ]
    assert repeat_options(given, ["--rates"]) == expected


def test_a_command_is_told_as_it_is_typed_again():
    installed = ["/usr/bin/python3", "/home/ann/.venv/bin/vllm-kvcompress", "bench", "quality"]
    assert command_line([*installed, "--peer", "a(b)"]) == (
        "vllm-kvcompress bench quality --peer 'a(b)'"
    )
    module = ["/usr/bin/python3", "-m", "vllm_kvcompress.bench.overhead"]
    assert command_line(module) == "python -m vllm_kvcompress.bench.overhead"


def test_the_report_names_command_machine_and_parameters(tmp_path):
    path = tmp_path / "new" / "report.json"
    write_report(path, 3, {"model": tmp_path, "n": 1}, results=[1, 2])
    report = json.loads(path.read_text())
    assert report["results"] == [1, 2]
    assert report["parameters"] == {"model": str(tmp_path), "n": 1}
    assert report["command"].startswith("python ")
    assert report["machine"]["threads"] == 3 and report["machine"]["versions"]["vllm-kvcompress"]


def test_the_cpu_model_is_read_from_cpuinfo(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Abacus 3000\nmodel name\t: Abacus 3000\n")
    assert cpu_model(cpuinfo) == "Abacus 3000"
