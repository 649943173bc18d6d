"""Tables in pages: what a benchmark measured, between two markers of a page that people wrote."""

from pathlib import Path

from dpo.files import written_whole

MARKERS = ("<!-- table written by a benchmark -->", "<!-- end of the table -->")


def put_table(page: Path, table: str) -> None:
    """Put a table between the markers of a page, in the place of the one there."""
    head, _, rest = page.read_text().partition(MARKERS[0])
    tail = rest.partition(MARKERS[1])[2]
    with written_whole(page) as aside:
        aside.write_text(f"{head}{MARKERS[0]}\n\n{table}\n\n{MARKERS[1]}{tail}")
