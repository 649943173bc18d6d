"""Sample responses to prompts, for people or a judge to rank."""

import json
from pathlib import Path
from typing import Any

from dpo.common.errors import InputError
from dpo.common.files import atomic_write


def sample(
    prompts: Path, output: Path, checkpoint: Path | None, *, responses: int, max_new_tokens: int, seed: int
) -> None:
    """Write the responses of a checkpoint, by default the champion, to each prompt of a file.

    A line of the output has the fields of the prompt, `responses` and `ranks`, a list of nulls to fill in: 1 is
    the best. Truncated, empty and repeated responses are left out, and so are prompts with fewer than two others.

    Raises:
        InputError: a row is not a prompt, the output exists or would be empty, or there is no such checkpoint.
    """
    if output.exists():
        raise InputError(f"{output}: the file exists; move it, or choose another --output")
    if checkpoint is not None and not any(checkpoint.glob("*.safetensors")):
        raise InputError(f"{checkpoint}: no checkpoint; run `dvc repro` or `dvc pull` to get this project's")
    from dpo.data.prompts import read_prompts

    rows = read_prompts(prompts)
    from dpo.config import load_params  # after the checks: torch and transformers start slowly
    from dpo.engine.chat import Conversation
    from dpo.evaluation.sampling import response_table

    params = load_params()
    if max_new_tokens >= params.engine.max_length:
        fault = f"leaves no room for a prompt in engine.max_length ({params.engine.max_length}); lower it"
        raise InputError(f"--max-new-tokens: {max_new_tokens} {fault}")
    settings = params.sampling(max_new_tokens) | {"seed": seed}
    with _loaded(params, checkpoint) as (model, tokenizer):
        if not tokenizer.chat_template and (row := next((row for row in rows if not _is_text(row)), None)):
            fault = "it has a conversation, tools or variables, but the tokenizer has no chat template"
            raise InputError(f"{row['where']}: {fault}; use a prompt of one text")
        asked = [
            row["turns"][0]["content"]
            if _is_text(row)
            else Conversation(row["turns"], row["tools"], row["variables"])
            for row in rows
            for _ in range(responses)
        ]
        table = response_table(model, tokenizer, asked, **settings)
    lines = []
    for number, row in enumerate(rows):
        own = table.iloc[number * responses : (number + 1) * responses]
        texts = list(dict.fromkeys(text.strip() for text in own["response"][own["finished"]] if text.strip()))
        if len(texts) > 1:
            ranks = [None] * len(texts)
            lines.append(json.dumps(row["fields"] | {"responses": texts, "ranks": ranks}, ensure_ascii=False))
    truncated = len(table) - int(table["finished"].sum())
    if not lines:
        raise InputError(
            f"{prompts}: no prompt has two different responses; {truncated} of {len(table)} were truncated, so "
            "raise --max-new-tokens or --responses"
        )
    with atomic_write(output) as tmp:
        tmp.write_text("".join(f"{line}\n" for line in lines))
    print(
        f"{output}: {len(lines)} of {len(rows)} prompts have two or more different responses; {truncated} of "
        f"{len(table)} responses were truncated and left out. Replace the nulls in `ranks`; 1 is the best."
    )


def _is_text(row: dict[str, Any]) -> bool:
    """Return whether a prompt is a single user turn."""
    plain = row["tools"] is None and row["variables"] is None
    return plain and len(row["turns"]) == 1 and row["turns"][0]["role"] == "user"


def _loaded(params: Any, checkpoint: Path | None) -> Any:
    """Return a context with model and tokenizer of a checkpoint folder, or of the champion."""
    from contextlib import nullcontext

    if checkpoint is not None:
        from dpo.common.distributed import this_process
        from dpo.engine.logprobs import load_model
        from dpo.engine.pretrained import load_tokenizer

        model = load_model(checkpoint, **params.engine.loading, frozen=True).to(this_process().device)
        return nullcontext((model, load_tokenizer(checkpoint)))
    from tasks.commands.promote import opponent
    from tasks.tracking import offline, registry

    offline.connect()
    champion = registry.champion()
    if champion is None:
        raise InputError(
            "MLflow: there is no champion yet; name a folder with --checkpoint, such as models/reference"
        )
    return opponent(params, champion)
