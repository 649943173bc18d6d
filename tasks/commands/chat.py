"""Chat with a policy and its reference side by side."""

import shutil
import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dpo.common.errors import InputError


def chat(policy: Path, reference: Path, *, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Print the responses of both models to typed prompts. Raise InputError if a folder has no checkpoint."""
    folders = [policy, reference]
    for folder in folders:
        if not any(folder.glob("*.safetensors")):
            raise InputError(f"{folder}: no checkpoint; run `dvc repro` or `dvc pull` to get this project's")
    from dpo.common.distributed import this_process  # after the check: torch and transformers start slowly
    from dpo.engine.logprobs import load_model
    from dpo.engine.pretrained import load_tokenizer
    from dpo.evaluation.sampling import sample

    tokenizer = load_tokenizer(policy)
    models = [load_model(folder).to(this_process().device) for folder in folders]
    conversations: list[list[dict[str, str]]] = [[], []]
    print("Type a prompt. /new starts a new conversation, /quit or Ctrl-D ends the chat.")
    while (text := _read_prompt()) != "/quit":
        if text in ("", "/new"):
            conversations = [[], []] if text else conversations
            continue
        responses = []
        for model, conversation in zip(models, conversations, strict=True):
            conversation.append({"role": "user", "content": text})
            prompt: Any = conversation if tokenizer.chat_template else text
            (ids,) = sample(
                model, tokenizer, [prompt], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            )
            responses.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
            conversation.append({"role": "assistant", "content": responses[-1]})
        print(_columns([str(folder) for folder in folders], responses, shutil.get_terminal_size().columns))


def _read_prompt() -> str:
    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return "/quit"


def _columns(titles: list[str], texts: list[str], width: int) -> str:
    """Return two texts side by side under their titles, or one below the other if the terminal is narrow."""
    if width < 60:
        return "\n\n".join(f"{title}:\n{text}" for title, text in zip(titles, texts, strict=True))
    each = (width - 3) // 2
    columns = [[title, "-" * min(each, len(title))] for title in titles]
    for column, text in zip(columns, texts, strict=True):
        column += [row for line in text.split("\n") for row in textwrap.wrap(line, each)]
    return "\n".join(f"{left:<{each}} | {right}" for left, right in zip_longest(*columns, fillvalue=""))
