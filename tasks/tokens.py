"""Stage `tokens`: encode pairs and demonstrations once for all stages that run a model."""

from dpo.config import load_params
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.token_table import write_table
from tasks.common.paths import BASE, DEMONSTRATIONS, EVAL, TOKENS_DEMONSTRATIONS, TOKENS_EVAL, TOKENS_TRAIN, TRAIN
from tasks.common.runner import run


def main() -> None:
    """Write the token tables."""
    max_length = load_params().engine.max_length
    tokenizer = load_tokenizer(BASE)
    for folder, rows in ((TOKENS_TRAIN, TRAIN), (TOKENS_EVAL, EVAL)):
        write_table(folder, rows, tokenizer, max_length)
    write_table(TOKENS_DEMONSTRATIONS, DEMONSTRATIONS, tokenizer, max_length, single=True)


if __name__ == "__main__":
    run(main)
