"""Write the tables of benchmarks between two markers of a Markdown page."""

from pathlib import Path

from dpo.common.files import atomic_write


def put_table(page: Path, name: str, table: str) -> None:
    """Replace the table between its markers in a page.

    Raises:
        ValueError: the page does not have these markers.
    """
    start, end = markers(name)
    head, table_then_tail = page.read_text().split(start)
    _, tail = table_then_tail.split(end)
    with atomic_write(page) as tmp:
        tmp.write_text(f"{head}{start}\n\n{table}\n\n{end}{tail}")


def markers(name: str) -> tuple[str, str]:
    """Return the lines before and after the table of this name."""
    return f"<!-- table {name}, written by a benchmark -->", f"<!-- end of table {name} -->"
