"""Links, tables and generated parts of the documentation."""

import ast
import importlib
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

import pytest
from pydantic import Field

from benchmarks.page import markers
from dpo.common.settings import Settings
from dpo.config import Params
from dpo.data.rules import RULES
from dpo.evaluation.settings import GuardrailSettings
from dpo.training.settings import SweepSettings
from tools import settings_reference

ROOT = Path(__file__).parents[2]
TRACKED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True)
PAGES = [path for path in map(Path, TRACKED.stdout.splitlines()) if (ROOT / path).exists()]
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
MAX_COLUMNS = 8


def text_of(page):
    """Return a page without its code blocks."""
    return FENCED.sub("", (ROOT / page).read_text())


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_relative_links_resolve(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"\w+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page.parent / target).resolve() if target else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.relative_to(ROOT))):
            broken.append(link)
    assert not broken


def test_every_page_is_in_the_index():
    pages = {path.relative_to("docs") for path in PAGES if path.parts[0] == "docs"} - {Path("README.md")}
    linked = {Path(link) for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / "docs/README.md").read_text())}
    assert pages == linked


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_tables_have_at_most_eight_columns(page):
    separators = re.findall(r"^\|(?: ?:?-+:? ?\|)+$", text_of(page), re.MULTILINE)
    assert [line for line in separators if line.count("|") - 1 > MAX_COLUMNS] == []


def test_the_readme_has_at_most_130_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def benchmark_tables():
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "put_table"
            if called and isinstance(node.args[1], ast.Constant):
                yield f"benchmarks.{path.stem}", node.args[1].value
    yield "tests.support.faults.__main__", "faults"


@pytest.mark.parametrize(("module", "name"), benchmark_tables())
def test_pages_have_the_markers_of_benchmark_tables(module, name):
    page = ROOT / importlib.import_module(module).PAGE
    start, end = markers(name)
    assert re.search(f"{re.escape(start)}\n\n.*\\|.*{re.escape(end)}", page.read_text(), re.DOTALL)


def test_the_settings_page_is_up_to_date():
    page = (ROOT / settings_reference.PAGE).read_text()
    assert page == settings_reference.render(Params), "run `python -m tools.settings_reference`"


@dataclass(frozen=True, kw_only=True)
class Inner(Settings):
    """A section below."""

    share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """A share,
    on two lines."""


@dataclass(frozen=True, kw_only=True)
class Variant(Settings):
    """A variant with a kind."""

    kind: Literal["one"]


@dataclass(frozen=True, kw_only=True)
class Section(Settings):
    """A section."""

    mode: Literal["a", "b"] = "a"
    """Not | a column."""
    limits: dict[str, float] = field(default_factory=lambda: {"x": 1.0})
    several: tuple[Variant, ...] = ()
    inner: Inner | None = None


@dataclass(frozen=True, kw_only=True)
class Shape(Settings):
    """The base of a registry."""


@dataclass(frozen=True, kw_only=True)
class Circle(Shape):
    """A circle."""

    radius: float = 2.0


SHAPES = {"circle": Circle}


@dataclass(frozen=True, kw_only=True)
class Root(Settings):
    """All settings."""

    seed: int
    shapes: Mapping[str, Shape]
    """One section per shape."""
    section: Section = field(default_factory=Section)


def rows(page, heading):
    """Return the names in the first column of the table under a heading."""
    section = (ROOT / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def test_the_guide_lists_every_rule():
    assert rows("docs/guides/data.md", "Rules") == list(RULES)


def test_the_guide_lists_every_loss():
    losses = get_args(get_args(get_type_hints(SweepSettings)["losses"])[0])
    assert rows("docs/guides/evaluation.md", "Losses") == list(losses)
    assert rows("docs/reference/losses.md", "Equations") == list(losses)


def test_the_guide_lists_every_guardrail():
    section = (ROOT / "docs/guides/evaluation.md").read_text().split("\n## Guardrails\n")[1].split("\n## ")[0]
    missing = [limit.name for limit in fields(GuardrailSettings) if f"`{limit.name}` |" not in section]
    assert not missing


def test_the_settings_page_shows_types_defaults_and_descriptions():
    page = settings_reference.render(Root)
    assert "| `seed` | integer | required |  |" in page
    assert '| `section.mode` | `a`, `b` | `"a"` | Not \\| a column. |' in page
    assert '| `section.limits` | mapping of text to number | `{"x": 1.0}` |  |' in page
    assert "| `section.several` | list of section | `[]` |  |" in page
    assert "| `section.inner` | section or null | `null` |  |" in page
    assert "### section.several, kind one\n\nA variant with a kind.\n" in page
    assert "## shapes\n\nOne section per shape.\n\n### shapes.circle\n\nA circle.\n" in page
    assert "| `shapes.circle.radius` | number | `2.0` |  |" in page
    assert "| `section.inner.share` | number at least 0 and below 1 | `0.5` | A share, on two lines. |" in page
