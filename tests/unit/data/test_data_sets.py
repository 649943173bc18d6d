"""Saved data sets, data sets of the hub, and the places that `data.source` may name."""

import shutil
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, DatasetDict

from dpo.common.errors import InputError, TransientError
from dpo.data.sources import read_source
from tests.support.data_files import FORMS, data_params, read, rows_of, texts, write


@pytest.mark.parametrize("held_out", ["test", "validation", "test_prefs"])
def test_a_saved_data_set_keeps_its_splits(tmp_path, held_out):
    data = DatasetDict({"train": Dataset.from_list(texts(3)), held_out: Dataset.from_list(texts(2, 3))})
    data.save_to_disk(str(tmp_path / "saved"))
    raws, source = read(tmp_path / "saved"), str(tmp_path / "saved")
    assert [raw.row for raw in raws] == [
        *({**row, "split": "train", "source": source} for row in texts(3)),
        *({**row, "split": "eval", "source": source} for row in texts(2, 3)),
    ]
    assert [raw.file for raw in raws] == [
        *[f"{tmp_path / 'saved'}:train"] * 3,
        *[f"{tmp_path / 'saved'}:{held_out}"] * 2,
    ]
    assert [raw.line for raw in raws] == [1, 2, 3, 1, 2]


def test_a_saved_data_set_without_splits_sets_no_split(tmp_path):
    Dataset.from_list(FORMS["implicit prompt"]).save_to_disk(str(tmp_path / "saved"))
    assert rows_of(tmp_path / "saved") == FORMS["implicit prompt"]
    DatasetDict({"train": Dataset.from_list(texts(2))}).save_to_disk(str(tmp_path / "single"))
    assert rows_of(tmp_path / "single") == texts(2)


def truncate_arrow(folder):
    (file,) = folder.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:300])


@pytest.mark.parametrize(
    "damage",
    [
        truncate_arrow,
        lambda folder: next(folder.glob("*.arrow")).unlink(),
        lambda folder: (folder / "dataset_info.json").unlink(),
        lambda folder: (folder / "dataset_info.json").write_text('{"features": {"a": 3}}'),
        lambda folder: (folder / "state.json").write_text("{}"),
        lambda folder: (folder / "state.json").write_text("[]"),
        lambda folder: (folder / "state.json").write_text("{"),
    ],
)
def test_an_incomplete_saved_data_set_is_rejected(tmp_path, damage):
    Dataset.from_list(texts()).save_to_disk(str(tmp_path / "saved"))
    damage(tmp_path / "saved")
    with pytest.raises(InputError, match="saved: not a complete saved data set"):
        read(tmp_path / "saved")


def test_a_hub_data_set_is_loaded_at_its_revision_with_its_splits(own, monkeypatch):
    calls = []

    def load_dataset(name, config, revision):
        calls.append((name, revision))
        return DatasetDict({"train": Dataset.from_list(texts(6)), "test": Dataset.from_list(texts(3, 6))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    raws = list(read_source(data_params(source="someone/pairs", revision="abc"), 1))
    assert calls == [("someone/pairs", "abc")]
    assert [raw.row["split"] for raw in raws] == ["train"] * 6 + ["eval"] * 3
    assert [raw.row["prompt"] for raw in raws] == [row["prompt"] for row in texts(9)]
    assert (raws[6].file, raws[6].line) == ("someone/pairs:test", 1)


def test_a_hub_data_set_without_eval_data_sets_no_split(own, monkeypatch):
    loaded = DatasetDict({"train_prefs": Dataset.from_list(texts(2)), "train_sft": Dataset.from_list(texts(2, 2))})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, revision: loaded)
    rows = [raw.row for raw in read_source(data_params(source="someone/pairs", revision="abc"), 1)]
    assert rows == texts(4)


@pytest.mark.parametrize(
    "error", [datasets.exceptions.DatasetNotFoundError("gone"), OSError("gone"), ValueError("gone")]
)
def test_a_hub_data_set_that_cannot_be_loaded_raises_input_error(own, monkeypatch, error):
    def load_dataset(name, config, revision):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="cannot load 'a/b' at 'main': gone"):
        read_source(data_params(source="a/b", revision="main"), 1)


class HttpError(OSError):
    """An error with the response of a server, as huggingface_hub raises it."""

    def __init__(self, status):
        super().__init__("gone")
        self.response = SimpleNamespace(status_code=status)


TransportError = type("TransportError", (Exception,), {})


def caused_by(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionError("gone"), TransientError),
        (TimeoutError("gone"), TransientError),
        (TransportError("gone"), TransientError),
        (HttpError(429), TransientError),
        (HttpError(503), TransientError),
        (caused_by(ValueError("gone"), HttpError(500)), TransientError),
        (caused_by(ValueError("gone"), ConnectionError("reset")), TransientError),
        (HttpError(404), InputError),
        (caused_by(datasets.exceptions.DatasetNotFoundError("gone"), HttpError(401)), InputError),
    ],
)
def test_connection_errors_of_the_hub_are_transient(own, monkeypatch, error, kind):
    def load_dataset(name, config, revision):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(kind, match="cannot load 'a/b' at 'main': gone"):
        read_source(data_params(source="a/b", revision="main"), 1)


def test_a_connection_error_in_offline_mode_is_not_transient(own, monkeypatch):
    def load_dataset(name, config, revision):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="cannot load 'a/b' at 'main': offline mode is enabled"):
        read_source(data_params(source="a/b", revision="main"), 1)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"source": "data/own/missing.csv"}, ["data/own/missing.csv: no such file or folder"]),
        ({"source": "../pairs.csv"}, ["../pairs.csv is outside data/own/", "copy it to data/own/pairs.csv"]),
        ({"source": "data/own/../../secret.csv"}, ["is outside data/own/", "copy it to data/own/secret.csv"]),
        ({"source": "/tmp/pairs.jsonl"}, ["/tmp/pairs.jsonl is outside data/own/"]),
        ({"source": "data"}, ["data is outside data/own/"]),
        ({"source": ("data/own/a.csv", "secret.csv")}, ["secret.csv is outside data/own/"]),
        ({"source": "someone/pairs"}, ["'someone/pairs' is not `default`", "a file or a folder", "data.revision"]),
        ({"source": ("someone/pairs",)}, ["'someone/pairs' is not `default`", "data.revision"]),
        ({"source": ("a/b", "data/own/a.csv")}, ["texts of a list may contain files and folders only"]),
        ({"source": ("default", "data/own/a.csv")}, ["texts of a list may contain files and folders only"]),
        ({"source": "default", "revision": "main"}, ["data.revision has no effect"]),
        ({"source": ("default",), "revision": "main"}, ["data.revision has no effect"]),
        ({"source": "data/own/a.csv", "revision": "main"}, ["data.revision has no effect"]),
        ({"source": ("data/own/a.csv", "a/b"), "revision": "main"}, ["data.revision has no effect"]),
    ],
)
def test_an_invalid_source_is_rejected_with_the_fix(own, params, words):
    write(own / "a.csv", texts())
    write(own.parent.parent / "secret.csv", texts())
    with pytest.raises(InputError) as error:
        list(read_source(data_params(**params), 1))
    assert all(word in str(error.value) for word in words), error.value


def test_the_data_folder_can_be_a_symbolic_link(own, tmp_path):
    write(tmp_path / "other/a.jsonl", texts())
    shutil.rmtree(own)
    own.symlink_to(tmp_path / "other")
    for name in ("data/own/a.jsonl", "data/own", str(own / "a.jsonl")):
        assert [raw.row for raw in read_source(data_params(source=name), 1)] == texts()
