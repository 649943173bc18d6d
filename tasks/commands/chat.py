"""Talk to a policy and to its reference side by side: `python -m tasks.commands.chat models/TRIAL`."""

import argparse
import shutil
import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dpo.common.distributed import this_process
from dpo.common.errors import InputError
from dpo.engine.logprobs import load_model
from dpo.engine.pretrained import load_tokenizer
from dpo.evaluation.sampling import sample
from tasks.common.paths import REFERENCE
from tasks.common.runner import run

HELP = "Type a prompt; /new forgets the conversation, /quit (or Ctrl-D) leaves."


def main() -> None:
    """Read prompts, print both answers."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.commands.chat", description="Talk to a policy and to its reference side by side."
    )
    parser.add_argument("policy", type=Path, help="checkpoint of a policy")
    parser.add_argument(
        "--reference", type=Path, default=REFERENCE, help="checkpoint to compare with (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=_above_0, default=0.7, help="of sampling (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same answers (default: 0)")
    given = parser.parse_args()
    sides = [given.policy, given.reference]
    for folder in sides:
        if not any(folder.glob("*.safetensors")):
            raise InputError(
                f"{folder}: no checkpoint here; `dvc repro` or `dvc pull` brings those of this project"
            )
    tokenizer = load_tokenizer(given.policy)
    models = [load_model(folder).to(this_process().device) for folder in sides]
    talks: list[list[dict[str, str]]] = [[], []]
    print(HELP)
    while (text := _ask()) != "/quit":
        if text in ("", "/new"):
            talks = [[] for _ in sides] if text else talks
            continue
        answers = []
        for model, talk in zip(models, talks, strict=True):
            talk.append({"role": "user", "content": text})
            prompt: Any = talk if tokenizer.chat_template else text
            (ids,) = sample(
                model, tokenizer, [prompt],
                max_new_tokens=given.max_new_tokens, temperature=given.temperature, seed=given.seed,
            )  # fmt: skip
            answers.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
            talk.append({"role": "assistant", "content": answers[-1]})
        print(_columns([str(folder) for folder in sides], answers, shutil.get_terminal_size().columns))


def _above_0(text: str) -> float:
    """A number of the command line."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return float(text)


def _ask() -> str:
    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return "/quit"


def _columns(titles: list[str], texts: list[str], width: int) -> str:
    """Texts beside one another under their titles, or one below the other where the terminal is narrow."""
    if width < 60:
        return "\n\n".join(f"{title}:\n{text}" for title, text in zip(titles, texts, strict=True))
    each = (width - 3) // 2
    columns = [
        [title, "-" * min(each, len(title))]
        + [row for line in text.split("\n") for row in textwrap.wrap(line, each)]
        for title, text in zip(titles, texts, strict=True)
    ]
    return "\n".join(f"{left:<{each}} | {right}" for left, right in zip_longest(*columns, fillvalue=""))


if __name__ == "__main__":
    run(main)
