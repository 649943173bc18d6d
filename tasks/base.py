"""Stage `base`: the model that params.yaml names, as safetensors with its tokenizer."""

from dpo.config import load_params
from dpo.files import written_whole
from dpo.models import load_base
from tasks.stage import BASE, run


def main() -> None:
    """Fetch and save."""
    model, tokenizer = load_base(load_params().model)
    with written_whole(BASE) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


if __name__ == "__main__":
    run(main)
