"""Assemble a policy as a repository of the hub, and upload it: `dpo publish TRIAL REPO`."""

import shutil
from pathlib import Path

from dpo.common.errors import InputError
from dpo.common.files import atomic_write
from dpo.config import load_params
from tasks.commands.lineage import of_folder
from tasks.commands.results import capability_lines
from tasks.common.paths import model_card, policy_folder

PUBLISHED = Path("published")


def publish(name: str, repo: str, *, private: bool, dry_run: bool) -> None:
    """Write `published/TRIAL` with weights, tokenizer, provenance and the card as `README.md`, and upload it.

    Raises:
        InputError: the trial, its checkpoint or its card does not exist, the weights differ from the provenance,
            an adapter names a folder as its base, or the hub refuses the upload.
    """
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
    with atomic_write(folder) as tmp:
        shutil.copytree(checkpoint, tmp, dirs_exist_ok=True)
        text = card.read_text().replace(f'"{checkpoint}"', f'"{repo}"')
        if lines := capability_lines(name):
            text += "\n## Capabilities\n\n" + "".join(f"- {line}\n" for line in lines)
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
