"""Manifests: `manifest.json` names what a file was computed from, so that readers refuse a stale file."""

import json
from collections.abc import Mapping
from pathlib import Path

from dpo.common.errors import InputError
from dpo.common.files import sha256, write_json


def write_manifest(file: Path, key: Mapping[str, object]) -> None:
    """Write `key` and the SHA-256 of `file` beside it."""
    write_json(file.with_name("manifest.json"), {**key, file.stem: sha256(file)})


def check_manifest(file: Path, key: Mapping[str, object], kind: str, stage: str) -> None:
    """Check that `file` is complete and unaltered, and that its manifest has the values of `key`.

    Raises:
        InputError: it is not. The message names what differs, and the stage to run.
    """
    folder = file.parent
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        content = sha256(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no complete {kind} ({error}); run the stage `{stage}`") from error
    differing = [name for name, value in {**key, file.stem: content}.items() if manifest.get(name) != value]
    if differing:
        raise InputError(
            f"{folder}: stale {kind}, refused: {', '.join(differing)} differ from the inputs that it "
            f"was computed with; run the stage `{stage}` again"
        )
