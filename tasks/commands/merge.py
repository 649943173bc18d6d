"""Put a LoRA adapter into the weights of its base: `python -m tasks.commands.merge models/TRIAL FOLDER`."""

import argparse
from pathlib import Path

from dpo.common.errors import InputError
from dpo.engine.base_model import load_checkpoint
from dpo.engine.pretrained import load_tokenizer
from dpo.training.train import save_checkpoint
from tasks.commands.lineage import check_base, of_folder
from tasks.common.runner import run


def main() -> None:
    """Load, merge, save."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.commands.merge", description="Merge a LoRA adapter into its base."
    )
    parser.add_argument("adapter", type=Path, help="checkpoint of a policy trained with dpo.lora")
    parser.add_argument("folder", type=Path, help="where the whole model goes")
    given = parser.parse_args()
    if not (given.adapter / "adapter_config.json").is_file():
        raise InputError(
            f"{given.adapter}: no adapter_config.json; a policy trained without dpo.lora is whole already"
        )
    if given.folder.exists():
        raise InputError(f"{given.folder}: exists; name a new folder")
    adapter = of_folder(given.adapter)
    check_base(given.adapter, adapter)
    facts = {**adapter, "merged_from": adapter["weights"]}
    tokenizer = load_tokenizer(given.adapter)
    save_checkpoint(load_checkpoint(given.adapter), tokenizer, given.folder, facts)


if __name__ == "__main__":
    run(main)
