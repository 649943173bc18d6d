"""Merge a LoRA adapter into the weights of its base model."""

from pathlib import Path

from dpo.common.errors import InputError
from dpo.engine.base_model import load_checkpoint
from dpo.engine.pretrained import load_tokenizer
from dpo.training.train import save_checkpoint
from tasks.commands.lineage import check_base, of_folder


def merge(adapter: Path, folder: Path) -> None:
    """Write the merged model to a new folder, with the adapter's provenance.

    Raises:
        InputError: `adapter` is not an adapter, its base has changed, or `folder` exists.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise InputError(f"{adapter}: no adapter_config.json; a policy trained without dpo.lora needs no merge")
    if folder.exists():
        raise InputError(f"{folder}: exists; name a new folder")
    facts = of_folder(adapter)
    check_base(adapter, facts)
    facts = {**facts, "merged_from": facts["weights"]}
    save_checkpoint(load_checkpoint(adapter), load_tokenizer(adapter), folder, facts)
