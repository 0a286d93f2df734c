"""`vllm-kvcompress bench report`."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.options import BenchCommand
from vllm_kvcompress.bench.report.page import Chapter, Page, image, render, section
from vllm_kvcompress.bench.report.read import Found, read_reports
from vllm_kvcompress.bench.report.tradeoff import Tradeoff, tradeoffs

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(cls=BenchCommand)
def main(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="The folder of reports.")],
    out: Annotated[
        Path | None, typer.Option(help="The page.", show_default="index.html in RESULTS")
    ] = None,
) -> None:
    """One page out of every report that `bench` wrote below a folder.

    Tables, plots, verdicts, commands, machines and notes of each, in one HTML file that needs no
    other file, no script and no network: send it, or open it on a phone. Where a quality and a
    throughput report are of the same model it also draws what is still answered right against
    tokens per second, by rate; that figure is left beside the page as `tradeoff.png`.

    JSON files that are no reports are named and skipped. Exit code 2: there is nothing to show,
    or the page cannot be written.

    Example: `vllm-kvcompress bench report results`
    """
    out = out or results / "index.html"
    try:
        found, problems = read_reports(results)
        for problem in problems:
            typer.echo(f"left out: {problem}", err=True)
        if not found:
            raise ValueError(f"no report below {results}: run `vllm-kvcompress bench quality`")
        out.parent.mkdir(parents=True, exist_ok=True)
        sections = [section(results, one, number) for number, one in enumerate(found, 1)]
        for shown in (plot for one in sections for plot in one.plots if plot.missing):
            typer.echo(f"plot left out: {shown.missing}", err=True)
        out.write_text(render(Page(sections, chapters(found, out.parent), problems)))
    except OSError as error:
        raise BenchError(f"{error.filename or results}: {error.strerror}") from None
    except ValueError as error:
        raise BenchError(str(error)) from None
    typer.echo(f"{len(found)} reports: {out}")


def chapters(found: list[Found], folder: Path) -> list[Chapter]:
    """The trade-offs among the reports, their figures drawn into the folder."""
    return [_chapter(one, number, folder) for number, one in enumerate(tradeoffs(found), 1)]


def _chapter(tradeoff: Tradeoff, number: int, folder: Path) -> Chapter:
    path = folder / ("tradeoff.png" if number == 1 else f"tradeoff-{number}.png")
    tradeoff.draw(path)
    table = tradeoff.table()
    return Chapter(
        f"tradeoff-{number}",
        tradeoff,
        table,
        image(table.title, "image/png", path.read_bytes()),
    )


if __name__ == "__main__":
    app()
