"""Several sources, each with a share of its rows."""

import json

import datasets
import pytest
from pydantic import TypeAdapter

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.data.ingest import write_raw_pairs
from dpo.data.settings import DataSettings, Source
from dpo.data.sources import BLOCK_ROWS, read_source
from tasks.report.validation import file_lines
from tests.support.project import ROOT


def rows(count, name):
    return [{"prompt": f"{name} {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(count)]


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("data/own/a", "data/own/b"):
        (tmp_path / folder).mkdir(parents=True)
    for name, count in (("a", 2 * BLOCK_ROWS + 345), ("b", 40)):
        text = "\n".join(map(json.dumps, rows(count, name)))
        (tmp_path / f"data/own/{name}/pairs.jsonl").write_text(text)
    return tmp_path


def settings(*items):
    return TypeAdapter(DataSettings).validate_json(json.dumps({"source": items}))


MIXTURE = settings({"path": "data/own/a", "share": 0.2}, "data/own/b/pairs.jsonl")


def used(params, seed):
    return [raw.row["prompt"] for raw in read_source(params, seed) if raw.is_used]


def test_a_share_of_each_source_is_drawn_with_a_fixed_seed(own):
    prompts = used(MIXTURE, 5)
    first = [int(prompt.split()[1]) for prompt in prompts if prompt.startswith("a")]
    assert len(first) == round(0.2 * (2 * BLOCK_ROWS + 345))
    assert prompts[len(first) :] == [f"b {n}" for n in range(40)]
    assert first == sorted(first) != list(range(0, len(first) * 5, 5))
    assert abs(len([n for n in first if n < BLOCK_ROWS]) - BLOCK_ROWS / 5) < 1
    assert used(MIXTURE, 5) == prompts != used(MIXTURE, 6)


def test_sources_are_counted_in_summary_table_and_terminal(own):
    path = own / "raw.parquet"
    files = write_raw_pairs(read_source(MIXTURE, 5), path, MIXTURE.origin, MIXTURE)
    assert {name: (file.rows, file.left_out) for name, file in files.items()} == {
        "data/own/a/pairs.jsonl": (2345, 1876),
        "data/own/b/pairs.jsonl": (40, 0),
    }
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(own / "cache"))
    assert {name: table["source"].count(name) for name in set(table["source"])} == {"a": 469, "b/pairs.jsonl": 40}
    lines = file_lines({name: vars(file) for name, file in files.items()})
    assert lines[0].endswith("read as pairs (469); 1876 of 2345 rows left out by the share of their source")
    assert "left out" not in lines[1]


def test_a_hub_data_set_in_a_list_has_its_own_revision_split_and_config(own, monkeypatch):
    def load_dataset(name, config, revision):
        assert (name, config, revision) == ("someone/pairs", "en", "abc")
        return datasets.DatasetDict({part: datasets.Dataset.from_list(rows(10, part)) for part in ("x", "y")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = {"id": "someone/pairs", "revision": "abc", "config": "en", "split": "y", "share": 0.5}
    params = settings("data/own/b", hub)
    raws = [raw for raw in read_source(params, 1) if raw.is_used]
    assert [raw.source for raw in raws] == ["b"] * 40 + ["someone/pairs"] * 5
    assert {raw.row["prompt"].split()[0] for raw in raws[40:]} == {"y"}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([{"path": "a", "share": 1.5}], "data.source.0.share: input should be less than or equal to 1, got 1.5"),
        ([{"path": "a", "share": 0}], "data.source.0.share: input should be greater than 0, got 0"),
        (["b", {"path": "a", "share": "half"}], "data.source.1.share: input should be a valid number, got 'half'"),
        ([{"path": "a", "part": 0.5}], "data.source.0.part: unknown key"),
        ([{"share": 0.5}], "a source has either a path (file or folder) or an id"),
        ([{"path": "a", "id": "b/c"}], "a source has either a path (file or folder) or an id"),
        ([{"id": "b/c"}], "an id needs a revision"),
        ([], "data.source: "),
        (3, "data.source: input should be a name, or a list of names and sections, got 3"),
    ],
)
def test_a_wrong_source_is_one_error_with_its_place(tmp_path, source, words):
    text = (ROOT / "params.yaml").read_text()
    (old,) = [line for line in text.splitlines() if line.startswith("  source: ")]
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(old, f"  source: {json.dumps(source)}"))
    with pytest.raises(InputError) as error:
        load_params(path)
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_path_in_a_section_is_checked_like_a_text(own):
    with pytest.raises(InputError, match=r"/etc is outside data/own/"):
        read_source(DataSettings(source=(Source(path="/etc"),)), 1)
