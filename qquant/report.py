"""``python -m qquant.report``: results of any commands joined into Markdown tables and one HTML page.

Only the command line: page/ joins them, charts/ draws them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qquant.console import user_errors


def report_command(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR", help="Folders with a report.json in or below them.")],
    out: Annotated[Path, typer.Option(help="Folder to make for report.html, report.md and results.json.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing joined report.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Join results into tables as Qwen's README has them and one page that works offline. Its path goes to stdout."""
    with user_errors(debug=debug):
        from qquant.publish import Kind, published, refuse_existing

        kind = Kind("a joined report", lambda folder: (folder / "report.html").exists())
        refuse_existing(out, kind, overwrite=overwrite)

        from qquant.charts.of_results import charts
        from qquant.page import grids, models, plans, scores
        from qquant.page.html import DATA_NAME, page
        from qquant.page.joined import Joined, find_results

        sources = find_results(folders)
        results = [source.result for source in sources]
        tables = [table for room in (scores, models, grids, plans) for table in room.tables(results)]
        verdicts = (*scores.verdicts(results), *plans.verdicts(results))
        joined = Joined(sources, verdicts, tuple(tables))
        data = joined.to_json()
        with published(out, kind, overwrite=overwrite) as staging:
            (staging / "report.html").write_text(page(joined, charts(results), data), encoding="utf-8")
            (staging / "report.md").write_text(joined.to_markdown(), encoding="utf-8")
            (staging / DATA_NAME).write_text(data, encoding="utf-8")
        typer.echo(out / "report.html")


if __name__ == "__main__":
    typer.run(report_command)
