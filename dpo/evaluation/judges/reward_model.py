"""A judge that is a reward model: a sequence classifier with one output, higher is better."""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix

import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from dpo.common.errors import InputError
from dpo.engine.base_model import check_place
from dpo.engine.pretrained import load_tokenizer, load_weights
from dpo.engine.tokenization import Prompt, turns_of
from dpo.evaluation.settings import RewardModelSettings

ROWS_AT_ONCE = 16
"""Answers, of nearly equal length, in one forward pass."""

WHERE = "params.yaml: evaluate.judge"

Row = Mapping[str, list[int]]
"""What the tokenizer makes of a prompt with its answer: `input_ids`, `attention_mask` and what else it has."""


def reward_scorer(params: RewardModelSettings) -> Callable[[Sequence[Prompt], Sequence[str]], list[float]]:
    """A function from prompts and answers to the scores of a reward model; the model is loaded at its first call.

    Raises:
        InputError: the model is a folder outside `models/own/` or with a revision, or a hub id without one. At
            the first call: it cannot be read, has no safetensors, has not one output, or lacks weights.
    """
    check_place("evaluate.judge", "model", params.model, params.revision)
    load = functools.cache(functools.partial(_load, params))
    return lambda prompts, answers: reward_scores(*load(), prompts, answers)


def _load(params: RewardModelSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """fp32 on a CPU; the checkpoint's own precision on a GPU."""
    source, gpu = (params.model, params.revision), torch.cuda.is_available()
    failed = f"cannot load '{params.model}':"
    try:
        outputs = load_weights(AutoConfig, *source).num_labels
        if outputs != 1:
            raise InputError(f"{failed} it has {outputs} outputs; name a model with one, the score")
        tokenizer = load_tokenizer(*source)
        tokenizer.truncation_side = "left"
        dtype = "auto" if gpu else torch.float32
        model, found = load_weights(
            AutoModelForSequenceClassification, *source, dtype=dtype, output_loading_info=True
        )
        if found["missing_keys"]:
            names = ", ".join(sorted(found["missing_keys"]))
            raise InputError(f"{failed} it has no weights for {names}; name one trained to score answers")
    except InputError as error:
        raise InputError(f"{WHERE}.model: {error}") from error
    model.config.use_cache = False
    return model.to("cuda" if gpu else "cpu").eval(), tokenizer


@torch.inference_mode()
def reward_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
) -> list[float]:
    """The model's output for each prompt with its answer, whatever stands beside it in a batch.

    With a chat template the model reads the conversation with the answer as the assistant's turn; without one,
    prompt and answer as the tokenizer joins a pair of texts. What is longer than the model can read loses tokens
    on the left of its prompt; an answer is never cut.

    Args:
        model: a sequence classifier with one output. Without a pad token it reads one row at a time: on a
            decoder any pad could be mistaken for the last token, which is the one that is scored.
        tokenizer: of the model, with `truncation_side` left.
        prompts: N prompts.
        answers: N answers; an empty one is an answer too.

    Raises:
        InputError: an answer leaves no room for a prompt token, or the chat template refuses a conversation.
    """
    config = model.config.get_text_config()
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", sys.maxsize))
    rows = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        try:
            rows.append(_row(tokenizer, prompt, answer, longest))
        except (InputError, TemplateError) as error:
            raise InputError(f"{WHERE}.model: answer {number}: {error}") from error
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    size = 1 if config.pad_token_id is None else ROWS_AT_ONCE
    scores = [0.0] * len(rows)
    with tqdm(total=len(rows), desc="scores", unit="answer", mininterval=2) as bar:
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            padded = _pad([rows[i] for i in batch], config.pad_token_id, model.device)
            for i, score in zip(batch, model(**padded).logits[:, 0].tolist(), strict=True):
                scores[i] = score
            bar.update(len(batch))
    return scores


def _row(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str, longest: int) -> Row:
    encode = functools.partial(tokenizer, return_attention_mask=True, verbose=False)
    if tokenizer.chat_template:
        asked = turns_of(prompt)
        answered = [*asked, {"role": "assistant", "content": answer}]
        before, whole = tokenizer.apply_chat_template([asked, answered], tokenize=False)
        row: Row = encode(whole, add_special_tokens=False)
        tokens = len(row["input_ids"])
        if tokens > longest:
            shared = encode(commonprefix([before, whole]), add_special_tokens=False)  # noqa: RUF071
            _check_room(tokens - len(shared["input_ids"]), longest)
        return {name: values[-longest:] for name, values in row.items()}
    text = prompt if isinstance(prompt, str) else "\n\n".join(f"{t['role']}: {t['content']}" for t in prompt)
    row = encode(text, answer)
    if len(row["input_ids"]) > longest:
        _check_room(len(encode("", answer)["input_ids"]), longest)
        row = encode(text, answer, truncation="only_first", max_length=longest)
    return row


def _check_room(tokens: int, longest: int) -> None:
    if tokens >= longest:
        raise InputError(
            f"it takes {tokens} of the {longest} tokens that the model can read, which leaves no room for the "
            "prompt; lower evaluate.max_new_tokens or name another model"
        )


def _pad(rows: Sequence[Row], pad: int | None, device: torch.device) -> dict[str, Tensor]:
    """Tensors [rows, tokens of the longest], padded on the right; a row alone needs no pad."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad}
    return {
        name: torch.tensor([row[name] + [fill.get(name, 0)] * (width - len(row[name])) for row in rows]).to(device)
        for name in rows[0]
    }
