"""Text from data in Markdown pages: no link, no picture and no HTML is made of it."""

import pytest
from markdown_it import MarkdownIt

from tasks.common.markdown import block, inline

HOSTILE = [
    "![x](http://127.0.0.1:1/x.png)",
    "[x](http://127.0.0.1:1)",
    "http://127.0.0.1:1/a_b",
    "www.example.org",
    "<img src=http://127.0.0.1:1/x.png>",
    "`` ` ![x](http://127.0.0.1:1/x.png) ```` ![x](http://127.0.0.1:1/x.png)",
    "[0.5, 1](http://127.0.0.1:1)",
    "[0.5, 1][x]\n\n[0.5, 1]: http://127.0.0.1:1",
    "a | ![x](http://127.0.0.1:1/x.png) | b",
    "a\n\n![x](http://127.0.0.1:1/x.png)\n\n```\n<b>b</b>",
    "__init__ *x* #",
    "`",
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_link_picture_or_html_is_made_of_text(text):
    page = f"- {inline(text)}\n\n| a |\n| --- |\n| {inline(text)} |\n\n{block(text)}\n\nend"
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    kinds = {each.type for token in tokens for each in [token, *(token.children or [])]}
    assert not kinds & {"link_open", "image", "html_inline", "html_block", "strong_open", "em_open"}
    plain = [each.content for token in tokens for each in token.children or [] if each.type == "text"]
    assert not any("http" in part or "www" in part for part in plain), "no address that an extension links"


@pytest.mark.parametrize(
    "text", ["sigmoid-0.1", "0.25 of 3 files, 20%", "a_b (c)", "0.610 [0.540, 0.680], p = 0.006 [-1, 2]."]
)
def test_plain_text_is_shown_as_it_is(text):
    assert inline(text) == text
