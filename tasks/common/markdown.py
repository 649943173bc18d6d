"""Text from data and from programs in Markdown, as code: no link, no picture and no HTML is made of it."""

import re

PLAIN = re.compile(r"(?!.*www\.)[\w .,:;()+=/%-]*")
"""Text that Markdown shows as it is."""
INTERVAL = re.compile(r"\[-?[\d.]+, -?[\d.]+\](?![(\[:])")
"""Brackets around numbers: no link, because other text from data cannot define a reference."""


def inline(text: str) -> str:
    """Return text for a line or a table cell: as it is if it is plain, else as a code span."""
    text = " ".join(text.split())
    words = INTERVAL.sub("", text)
    if PLAIN.fullmatch(words) and "//" not in words and "__" not in words:
        return text
    ticks = "`" * (_longest_ticks(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}".replace("|", "\\|")


def block(text: str) -> str:
    """Return text of several lines as a code block."""
    fence = "`" * max(3, _longest_ticks(text) + 1)
    return f"{fence}text\n{text}\n{fence}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
