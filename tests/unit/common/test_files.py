"""Atomic writes and hashes of files."""

import json

import pytest

from dpo.common.files import atomic_write, link_tree, sha256, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(path, folder, text):
    if folder:
        path.mkdir()
        (path / "content").write_text(text)
    else:
        path.write_text(text)


def write_and_fail(target, folder, error):
    with atomic_write(target) as tmp:
        write(tmp, folder, "incomplete")
        raise error


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "figures.csv"
    for text in ("old", "new"):
        with atomic_write(target) as tmp:
            tmp.write_text(text)
            assert not target.exists() or target.read_text() == "old"
        assert target.read_text() == text
    assert names(target.parent) == ["figures.csv"]


def test_a_folder_is_replaced_completely(tmp_path):
    target = tmp_path / "model"
    for name in ("old", "new"):
        with atomic_write(target) as tmp:
            tmp.mkdir()
            (tmp / name).touch()
    assert names(target) == ["new"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("folder", [True, False])
def test_a_failed_write_keeps_the_old_content(tmp_path, folder):
    target = tmp_path / "output"
    write(target, folder, "old")
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(target, folder, KeyboardInterrupt())
    assert (target / "content" if folder else target).read_text() == "old"
    assert names(tmp_path) == ["output"]


def test_a_failed_first_write_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        write_and_fail(tmp_path / "output", False, OSError("disk full"))
    assert names(tmp_path) == []


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    with atomic_write(tmp_path / "output") as partial:
        partial.write_text("first")
    partial.mkdir()
    (partial / "remains").touch()
    with atomic_write(tmp_path / "output") as tmp:
        assert not tmp.exists()
        tmp.write_text("complete")
    assert names(tmp_path) == ["output"]


def test_json_is_sorted_and_read_back_unchanged(tmp_path):
    value = {"b": [1, 0.1, None], "a": {"z": True}}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == value
    assert text.index('"a"') < text.index('"b"')
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_json_is_an_error_and_keeps_the_old_file(tmp_path, value):
    write_json(tmp_path / "x.json", {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"loss": value})
    assert json.loads((tmp_path / "x.json").read_text()) == {"loss": 1.0}
    assert names(tmp_path) == ["x.json"]


def test_sha256_depends_on_names_contents_and_order(tmp_path):
    for number, (name, content) in enumerate([("a", "1"), ("b", "1"), ("a", "2"), ("a", "1")]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / name).write_text(content)
    first, renamed, changed, same = (next(path.iterdir()) for path in sorted(tmp_path.iterdir()))
    assert sha256(first) == sha256(same)
    digests = [sha256(first), sha256(renamed), sha256(changed), sha256(first, renamed), sha256(renamed, first)]
    assert len({*digests, sha256()}) == 6
    assert all(len(digest) == 64 for digest in digests)


def test_sha256_of_one_file_equals_sha256sum(tmp_path):
    # sha256sum of "a " + sha256("1") + "\n"
    (tmp_path / "a").write_text("1")
    assert sha256(tmp_path / "a") == "c57763b2cca67b293d07cea2ded9989cccbbce7443e24f940446569b0d1bbf36"


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_old_content(tmp_path):
    target = tmp_path / "output"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_write(target):
        pass
    assert target.read_text() == "old"


@pytest.mark.parametrize("links", [True, False])
def test_a_linked_folder_has_the_same_files(tmp_path, monkeypatch, links):
    def refuse(*_):
        raise OSError("no links")

    if not links:
        monkeypatch.setattr("dpo.common.files.os.link", refuse)
    (tmp_path / "a/inner").mkdir(parents=True)
    (tmp_path / "a/inner/file").write_text("text")
    link_tree(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b/inner/file").read_text() == "text"
    assert (tmp_path / "b/inner/file").samefile(tmp_path / "a/inner/file") is links
