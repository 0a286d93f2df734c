import base64
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_kvcompress.accounting import held_share, plan
from vllm_kvcompress.bench.engine import BLOCK_TOKENS
from vllm_kvcompress.bench.harness import Summary, Verdict, write_report
from vllm_kvcompress.bench.report.command import app
from vllm_kvcompress.bench.report.page import kind_of
from vllm_kvcompress.bench.report.read import read_reports
from vllm_kvcompress.bench.report.tradeoff import tradeoffs
from vllm_kvcompress.bench.table import Table
from vllm_kvcompress.presets import shipped_presets

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
EVIL = '<script>alert("x")</script> & co'
VOID = {"meta", "img", "br", "link", "hr", "input"}
CACHE_BLOCKS = 200


class Tree(HTMLParser):
    """Tags that close in order, the text of every cell, and all attributes by tag."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all_of(self, tag: str, name: str) -> list[str]:
        return [v for t, n, v in self.attributes if (t, n) == (tag, name)]


def make_report(path: Path, **changes) -> None:
    arguments = {
        "bench": "attention",
        "title": "A title",
        "tables": [Table("Numbers", ["row", "a", "b"], [["one", "1.5", "-"], ["two", "7", "9"]])],
        **changes,
    }
    write_report(path, 1, arguments.pop("parameters", {"model": "m"}), **arguments)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def page_of(folder: Path, *arguments: object) -> Tree:
    result = run(folder, *arguments)
    assert result.exit_code == 0, result.output
    tree = Tree((folder / "index.html").read_text())
    assert not tree.open
    return tree


def test_every_cell_note_command_and_parameter_is_on_the_page(tmp_path):
    table = Table("Scores", ["policy", "100 %", "47 %"], [["plain vLLM", "99.1", ""]], "n = 300.")
    make_report(tmp_path / "deep" / "a.json", tables=[table], notes=["line 7: no prompt"])
    make_report(tmp_path / "b.json", bench="serve", title="Served")
    tree = page_of(tmp_path)
    expected = ["row", "a", "b", "one", "1.5", "-", "two", "7", "9"]
    assert tree.cells == [*expected, *table.columns, *table.rows[0]]  # serve comes first
    text = " ".join(tree.text)
    report = json.loads((tmp_path / "deep" / "a.json").read_text())
    for piece in (report["command"], report["machine"]["cpu"], "n = 300.", "line 7: no prompt"):
        assert piece in text
    assert "model: m" in text and report["machine"]["versions"]["torch"] in text


def test_the_contents_lead_to_every_report(tmp_path):
    for name in ("a", "b", "c"):
        make_report(tmp_path / f"{name}.json", title=f"Title {name}")
    tree = page_of(tmp_path)
    links, anchors = tree.all_of("a", "href"), tree.all_of("section", "id")
    assert len(links) == 3
    assert links == [f"#{anchor}" for anchor in anchors]


def test_reports_are_data_and_not_markup(tmp_path):
    make_report(
        tmp_path / "a.json",
        title=EVIL,
        tables=[Table(EVIL, [EVIL, EVIL], [[EVIL, EVIL]], EVIL)],
        plots=[tmp_path / f"{EVIL.replace('/', '')}.png"],
        verdicts=[Verdict(EVIL, Summary(1, 1, 1), 2)],
        notes=[EVIL],
        parameters={EVIL: EVIL},
    )
    tree = page_of(tmp_path)
    assert "script" not in tree.tags
    assert tree.cells == [EVIL] * 4


def test_the_page_needs_no_other_file(tmp_path):
    (tmp_path / "plot.png").write_bytes(PNG)
    make_report(tmp_path / "a.json", plots=[tmp_path / "plot.png"])
    tree = page_of(tmp_path)
    assert tree.all_of("img", "src") == [f"data:image/png;base64,{base64.b64encode(PNG).decode()}"]
    assert all(href.startswith("#") for href in tree.all_of("a", "href"))
    assert not {"link", "script", "iframe"} & set(tree.tags)


def test_verdicts_differ_by_word_and_sign(tmp_path):
    verdicts = [Verdict("good", Summary(2, 2, 2), 1), Verdict("bad", Summary(0.5, 0.5, 0.5), 1)]
    make_report(tmp_path / "a.json", verdicts=verdicts)
    text = [piece for piece in page_of(tmp_path).text if piece.strip()]
    assert text[text.index("✓ met") + 1].startswith(" good: 2.000, target at least 1")
    assert text[text.index("✗ MISSED") + 1].startswith(" bad: 0.500, target at least 1: 50% below")
    assert any("1 of 2 verdicts met" in piece for piece in text)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("broken", "{", "not JSON: Expecting property name"),
        ("foreign", '{"a": 1}', "no report of the bench: command: field required"),
        ("list", "[1, 2]", "no report of the bench: the whole"),
        ("deep", "[" * 100_000, "not JSON"),
        ("binary", "\udcff", "not JSON: not UTF-8 text"),
    ],
)
def test_a_foreign_file_is_named_and_skipped(tmp_path, name, content, said):
    make_report(tmp_path / "a.json")
    (tmp_path / f"{name}.json").write_text(content, errors="surrogateescape")
    result = run(tmp_path)
    assert result.exit_code == 0
    (line,) = [one for one in result.stderr.splitlines() if f"{name}.json" in one]
    assert said in line
    assert any(
        f"{name}.json" in piece for piece in Tree((tmp_path / "index.html").read_text()).text
    )


def test_a_table_with_a_cell_too_many_is_no_report(tmp_path):
    make_report(tmp_path / "a.json")
    report = json.loads((tmp_path / "a.json").read_text())
    report["tables"][0]["rows"][0].append("8")
    (tmp_path / "a.json").write_text(json.dumps(report))
    found, (problem,) = read_reports(tmp_path)
    assert found == []
    assert "4 cells for 3 columns" in problem


@pytest.mark.parametrize("plot", ["gone.png", "../secret.png", "text.txt"])
def test_a_plot_that_cannot_be_shown_is_said(tmp_path, plot):
    folder = tmp_path / "results"
    make_report(folder / "a.json", plots=[folder / plot])
    (tmp_path / "secret.png").write_bytes(PNG)
    (folder / "text.txt").write_text("words")
    tree = page_of(folder)
    assert "img" not in tree.tags
    assert any(f"Plot left out: {plot}" in piece for piece in tree.text)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_nothing_to_show_is_one_line_and_exit_2(tmp_path, make):
    make(tmp_path / "results")
    result = run(tmp_path / "results")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "results" in result.stderr


def test_the_page_goes_where_it_is_told(tmp_path):
    make_report(tmp_path / "a.json")
    result = run(tmp_path, "--out", tmp_path / "site" / "bench.html")
    assert result.exit_code == 0
    assert (tmp_path / "site" / "bench.html").exists()
    assert not (tmp_path / "index.html").exists()
    assert run(tmp_path, "--out", tmp_path).exit_code == 2


@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        ("", "number"),
        ("-", "number"),
        ("1,234", "number"),
        ("+8.3", "number"),
        ("12.9%", "number"),
        ("0.98 (0.91-1.02)", "number"),
        ("random", "word"),
        ("cannot start: fp8 on a CPU requires AVX-512", "long"),
    ],
)
def test_numbers_stand_to_the_right(cell, kind):
    assert kind_of(cell) == kind


def cell(task: str, policy: str, budget: str, held: str, score: str, unseen: str = "false"):
    return dict(
        task=task,
        length="1024",
        unseen=unseen,
        policy=policy,
        budget=budget,
        held_share=held,
        n="10",
        score=score,
        note="",
    )


def speed(rate: float, ratio: float, preset: str = "kv-compress"):
    total = {"median": ratio, "low": ratio - 0.1, "high": ratio + 0.1}
    return {
        "asks": {"kv_compress": preset, "kv_compress_rate": rate},
        "ratio_to_plain": {"total": total, "decode": {"median": 9, "low": 9, "high": 9}},
    }


def make_pair(folder: Path, cells: list, model: str = "m") -> None:
    make_report(folder / "quality.json", bench="quality", parameters={"model": "m"}, cells=cells)
    rows = {"rate 2": speed(2, 1.5), "rate 8": speed(8, 3.0), "snapkv 8": speed(8, 7.0, "snapkv")}
    make_report(
        folder / "throughput.json",
        bench="throughput",
        parameters={"model": model, "cache_blocks": CACHE_BLOCKS},
        points=[
            {
                "prompts": 4,
                "prompt_tokens": 512,
                "rows": {
                    "plain vLLM": {"asks": {}, "ratio_to_plain": speed(1, 1.0)["ratio_to_plain"]},
                    **rows,
                },
            }
        ],
    )


CELLS = [
    cell("needle", "plain vLLM", "", "1.0000", "1.0000"),
    cell("span", "plain vLLM", "", "1.0000", "0.8000"),
    cell("needle", "kv-compress", "0.5", "0.4700", "1.0000"),
    cell("span", "kv-compress", "0.5", "0.4700", "0.7000"),
    cell("span", "kv-compress", "0.5", "0.4700", "0.1000", unseen="true"),
    cell("span", "snapkv", "0.5", "0.4700", "0.2000"),
    cell("needle", "kv-compress", "0.125", "0.1000", "0.9000"),
    cell("span", "kv-compress", "0.125", "", ""),
]


def test_accuracy_and_throughput_meet_at_the_same_budget(tmp_path):
    make_pair(tmp_path, CELLS)
    (found,) = tradeoffs(read_reports(tmp_path)[0])
    ((load, steps),) = found.steps.items()
    assert (load.prompts, load.prompt_tokens, found.full_accuracy) == (4, 512, 0.9)
    settings = shipped_presets()["kv-compress"].settings(rate=2)
    held = held_share(plan(512, BLOCK_TOKENS, CACHE_BLOCKS + 1, settings))
    (step,) = steps  # at rate 8 one task has no score: the means would not compare
    assert (step.rate, step.accuracy, step.quality_held) == (2, pytest.approx(0.85), 0.47)
    assert (step.speed_held, step.ratio.median) == (held, 1.5)
    tree = page_of(tmp_path)
    assert (tmp_path / "tradeoff.png").exists()
    assert len(tree.all_of("img", "src")) == 1
    assert tree.cells[tree.cells.index("85.0") :][:3] == ["85.0", "47.0%", "1.50 (1.40-1.60)"]


def test_no_trade_off_between_different_models(tmp_path):
    make_pair(tmp_path, CELLS, model="another")
    assert tradeoffs(read_reports(tmp_path)[0]) == []
    page_of(tmp_path)
    assert not (tmp_path / "tradeoff.png").exists()


def test_a_report_of_another_version_has_no_trade_off_but_is_shown(tmp_path):
    make_pair(tmp_path, [{"task": "needle"}])
    assert "img" not in page_of(tmp_path).tags
