"""Chat with a policy, its reference and the base model side by side."""

import json
import shutil
import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dpo.common.errors import InputError
from dpo.common.files import PROVENANCE
from tasks.common.paths import BASE

HELP = """Type a prompt. /redo samples the last responses again, /new starts a new conversation,
/system TEXT starts one with a system prompt, /quit or Ctrl-D ends the chat."""

Message = dict[str, str]


def chat(policy: Path, reference: Path, *, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Print the responses of all models to typed prompts. Raise InputError if a folder has no checkpoint."""
    folders = [policy, reference]
    for folder in folders:
        if not any(folder.glob("*.safetensors")):
            raise InputError(f"{folder}: no checkpoint; run `dvc repro` or `dvc pull` to get this project's")
    folders += [BASE] * _is_fine_tuned_base(reference)
    from dpo.common.distributed import this_process  # after the check: torch and transformers start slowly
    from dpo.engine.logprobs import load_model
    from dpo.engine.pretrained import load_tokenizer
    from dpo.evaluation.sampling import sample

    tokenizer = load_tokenizer(policy)
    models = [load_model(folder).to(this_process().device) for folder in folders]
    conversations: list[list[Message]] = [[] for _ in models]
    sampled = 0  # responses since the start of the conversation; each one has a seed of its own
    print(HELP)
    while (text := _read_prompt()) != "/quit":
        command, _, words = text.partition(" ")
        if command in ("/new", "/system"):
            conversations, sampled = [_start(tokenizer, words.strip()) for _ in models], 0
        elif command == "/redo" and not any(message["role"] == "user" for message in conversations[0]):
            print("There is no response yet.")
        elif text:
            responses = []
            for model, conversation in zip(models, conversations, strict=True):
                if command == "/redo":
                    conversation.pop()
                else:
                    conversation.append({"role": "user", "content": text})
                prompt: Any = conversation if tokenizer.chat_template else conversation[-1]["content"]
                (ids,) = sample(
                    model, tokenizer, [prompt], max_new_tokens=max_new_tokens, temperature=temperature,
                    seed=seed + sampled,
                )  # fmt: skip
                responses.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
                conversation.append({"role": "assistant", "content": responses[-1]})
            sampled += 1
            print(_columns([str(folder) for folder in folders], responses, shutil.get_terminal_size().columns))


def _is_fine_tuned_base(reference: Path) -> bool:
    """Return whether a reference was trained from the weights in `models/base`, as its provenance says."""
    try:
        facts = json.loads((reference / PROVENANCE).read_text())
        return any(BASE.glob("*.safetensors")) and facts["models"][str(BASE)] != facts["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _start(tokenizer: Any, system: str) -> list[Message]:
    """Return the first message of a conversation, which is empty without a usable system prompt."""
    start = [{"role": "system", "content": system}]
    if not system:
        return []
    try:
        tokenizer.apply_chat_template([*start, {"role": "user", "content": "Hello"}], tokenize=False)
    except Exception as error:  # noqa: BLE001, templates raise errors of their own
        print(f"This model has no system prompt: {error}")
        return []
    return start


def _read_prompt() -> str:
    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return "/quit"


def _columns(titles: list[str], texts: list[str], width: int) -> str:
    """Return texts side by side under their titles, or one below the other if the terminal is narrow."""
    if width < 30 * len(texts):
        return "\n\n".join(f"{title}:\n{text}" for title, text in zip(titles, texts, strict=True))
    each = (width - 3 * (len(texts) - 1)) // len(texts)
    columns = [[title, "-" * min(each, len(title))] for title in titles]
    for column, text in zip(columns, texts, strict=True):
        column += [row for line in text.split("\n") for row in textwrap.wrap(line, each)]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(" | ".join([*(f"{cell:<{each}}" for cell in row[:-1]), row[-1]]) for row in rows)
