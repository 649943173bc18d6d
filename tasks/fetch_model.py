"""Stage `fetch_model`: fetch the base model and save it as safetensors with its tokenizer."""

from dpo.common.files import atomic_write
from dpo.config import load_params
from dpo.engine.base_model import load_base, save_base
from tasks.common.paths import BASE, check_copied
from tasks.common.runner import run


def main() -> None:
    """Run the stage."""
    settings = load_params().model
    check_copied(settings.base)
    model, tokenizer = load_base(settings)
    with atomic_write(BASE) as tmp:
        save_base(model, tokenizer, tmp)


if __name__ == "__main__":
    run(main)
