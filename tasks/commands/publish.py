"""Assemble a policy as a repository of the hub, and upload it: `dpo publish TRIAL REPO`."""

import shutil
import subprocess
from pathlib import Path

from dpo.common.errors import InputError
from dpo.common.files import atomic_write
from dpo.config import load_params
from tasks.commands.lineage import of_folder
from tasks.commands.results import capability_lines
from tasks.common.paths import model_card, policy_folder

PUBLISHED = Path("published")
CONVERTER = "convert_hf_to_gguf.py"
"""The program of llama.cpp that writes GGUF files."""


def publish(
    name: str, repo: str, *, private: bool, dry_run: bool, license: str | None = None, gguf: bool = False
) -> None:
    """Write `published/TRIAL` with weights, tokenizer, provenance and the card as `README.md`, and upload it.

    `license` is an identifier of the hub for the card. `gguf` adds the weights as one GGUF file in bf16.

    Raises:
        InputError: the trial, its checkpoint or its card does not exist, the weights differ from the provenance,
            an adapter names a folder as its base or is to become a GGUF file, llama.cpp is missing or cannot
            convert the model, or the hub refuses the upload.
    """
    if gguf and shutil.which(CONVERTER) is None:
        raise InputError(f"--gguf: {CONVERTER} is not on the PATH; install llama.cpp, or omit the option")
    trials = {trial.name: trial for trial in load_params().trials()}
    if name not in trials:
        raise InputError(f"TRIAL: {name!r} is not a trial of params.yaml: sweep; use one of {', '.join(trials)}")
    checkpoint, card, folder = policy_folder(trials[name]), model_card(trials[name]), PUBLISHED / name
    of_folder(checkpoint)
    if not card.is_file():
        raise InputError(f"{card}: no model card; run `dvc repro` or `dvc pull` to get it")
    from dpo.engine.pretrained import ADAPTER_CONFIG, read_adapter_config  # torch starts slowly

    if (checkpoint / ADAPTER_CONFIG).is_file() and not read_adapter_config(checkpoint).get("revision"):
        raise InputError(
            f"{checkpoint}: the adapter's base is a folder of this project, so that the adapter would not load "
            f"elsewhere; merge it with `dpo merge {checkpoint} FOLDER` and upload that folder"
        )
    if gguf and (checkpoint / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"{checkpoint}: an adapter has no GGUF file; merge it with `dpo merge {checkpoint} FOLDER`"
        )
    with atomic_write(folder) as tmp:
        shutil.copytree(checkpoint, tmp, dirs_exist_ok=True)
        if gguf:
            _convert(tmp, tmp / f"{name}.gguf")
        text = card.read_text().replace(f'"{checkpoint}"', f'"{repo}"')
        if lines := capability_lines(name):
            text += "\n## Capabilities\n\n" + "".join(f"- {line}\n" for line in lines)
        if license:
            text = _with_license(text, license)
        (tmp / "README.md").write_text(text)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print("\n".join(f"{file.stat().st_size:>14,}  {file.name}" for file in sorted(folder.iterdir())))
    if dry_run:
        print(f"{size:,} bytes in {folder}; nothing was uploaded (--dry-run)")
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Publish {name}")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        raise InputError(f"{repo}: the hub refuses the upload ({error}); check the name and HF_TOKEN") from error
    print(f"{done.commit_url}\n\nvllm serve {repo}")


def _convert(folder: Path, file: Path) -> None:
    """Write the model in a folder as a GGUF file with llama.cpp."""
    command = [CONVERTER, str(folder), "--outfile", str(file), "--outtype", "bf16"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"--gguf: {CONVERTER} cannot convert the model; its last output:\n{done.stderr[-2000:]}")


def _with_license(card: str, name: str) -> str:
    """Return a card with a licence in its metadata."""
    from huggingface_hub import ModelCard

    changed = ModelCard(card)
    changed.data["license"] = name
    return str(changed)
