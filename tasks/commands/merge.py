"""Merge a LoRA adapter into the weights of its base model."""

from pathlib import Path

from dpo.common.errors import InputError
from tasks.commands.lineage import of_folder
from tasks.tracking.provenance import weights


def merge(adapter: Path, folder: Path) -> None:
    """Write the merged model to a new folder, with the adapter's provenance.

    Raises:
        InputError: `adapter` is not an adapter, its base has changed, or `folder` exists.
    """
    config = adapter / "adapter_config.json"
    if not config.is_file():
        raise InputError(f"{adapter}: no adapter_config.json; a policy trained without dpo.lora needs no merge")
    if folder.exists():
        raise InputError(f"{folder}: exists; name a new folder")
    facts = of_folder(adapter)
    from dpo.engine.pretrained import adapter_base  # after the checks: torch and transformers start slowly
    from dpo.training.train import save_merged

    base, _ = adapter_base(adapter)
    recorded = facts.get("models", {}).get(facts.get("adapter_of"))
    if recorded is not None and isinstance(base, Path) and weights(base) != recorded:
        raise InputError(
            f"{adapter}: the weights in {base} are not those it was trained on (SHA-256 {recorded}); restore both "
            "from one commit with `git checkout` and `dvc checkout`"
        )
    facts["merged_from"] = facts.pop("weights")
    save_merged(adapter, folder, facts)
