"""Scores from a reward model: a sequence classifier with one output, higher is better."""

import functools
import sys
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from dpo.common.errors import InputError
from dpo.common.progress import progress
from dpo.engine.base_model import check_place
from dpo.engine.chat import Prompt, turns_of
from dpo.engine.pretrained import load_tokenizer, load_weights
from dpo.evaluation.settings import TRAINED_REWARD_MODELS, RewardModelSettings

BATCH_SIZE = 16  # rows, of similar length, in one forward pass
Row = Mapping[str, list[int]]  # `input_ids`, `attention_mask` and any further fields of the tokenizer's output


class RewardModel:
    """A function from prompts and responses to scores. The model is loaded at the first call.

    Raises:
        InputError: the model is a folder outside `models/own/` or with a revision, or a hub id without one. At
            the first call: it cannot be read, has no safetensors, has more than one output, or lacks weights.
    """

    def __init__(self, settings: RewardModelSettings, key: str) -> None:
        if key != "feedback" or Path(settings.model).parent != Path(TRAINED_REWARD_MODELS):
            check_place(key, "model", settings.model, settings.revision)
        self.settings = settings
        self.where = f"params.yaml: {key}.model"

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return one score per response."""
        try:
            return reward_scores(*self._loaded, prompts, responses)
        except InputError as error:
            raise InputError(f"{self.where}: {error}") from error

    @functools.cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer: fp32 on a CPU, the checkpoint's own precision on a GPU."""
        source, gpu = (self.settings.model, self.settings.revision), torch.cuda.is_available()
        failed = f"cannot load '{self.settings.model}':"
        outputs = load_weights(AutoConfig, *source).num_labels
        if outputs != 1:
            raise InputError(f"{failed} it has {outputs} outputs; use a model with one output, the score")
        tokenizer = load_tokenizer(*source)
        tokenizer.truncation_side = "left"
        dtype = "auto" if gpu else torch.float32
        model, report = load_weights(
            AutoModelForSequenceClassification, *source, dtype=dtype, output_loading_info=True
        )
        if report["missing_keys"]:
            names = ", ".join(sorted(report["missing_keys"]))
            raise InputError(f"{failed} it has no weights for {names}; use a model trained to score responses")
        model.config.use_cache = False
        return model.to("cuda" if gpu else "cpu").eval(), tokenizer


@torch.inference_mode()
def reward_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], responses: Sequence[str]
) -> list[float]:
    """Return the model's output for each prompt with its response. Scores do not depend on the batch.

    With a chat template the model reads the conversation with the response as the assistant's turn. Without one
    it reads prompt and response as a pair of texts. A sequence that exceeds the model's context is truncated at
    the left of its prompt; a response is never truncated, and may be empty. A model without a pad token reads one
    row at a time, because a decoder scores the last token that is not padding. The tokenizer's `truncation_side`
    must be left.

    Raises:
        InputError: a response leaves no room for a prompt token, or the chat template rejects a conversation.
    """
    config, max_tokens = model.config.get_text_config(), context_length(model, tokenizer)
    rows = []
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True), 1):
        try:
            rows.append(encoded(tokenizer, prompt, response, max_tokens))
        except (InputError, TemplateError) as error:
            raise InputError(f"response {number}: {error}") from error
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    size = 1 if config.pad_token_id is None else BATCH_SIZE
    scores: dict[int, float] = {}
    with progress(total=len(rows), desc="scores", unit="response", mininterval=2) as bar:
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            fields = {}
            for name in rows[0]:
                pad = (config.pad_token_id or 0) if name == "input_ids" else 0
                values = [torch.LongTensor(rows[i][name]).to(model.device) for i in batch]
                fields[name] = pad_sequence(values, batch_first=True, padding_value=pad)
            scores |= zip(batch, model(**fields).logits[:, 0].tolist(), strict=True)
            bar.update(len(batch))
    return [scores[i] for i in range(len(rows))]


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the maximum number of tokens that a model reads."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    return int(min(tokenizer.model_max_length, longest))


def encoded(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str, max_tokens: int) -> Row:
    """Return the tokens of a prompt with its response, at most `max_tokens` of them; see `reward_scores`."""
    encode = functools.partial(tokenizer, return_attention_mask=True, verbose=False)
    if tokenizer.chat_template:
        turns = turns_of(prompt)
        conversation = [*turns, {"role": "assistant", "content": response}]
        before, text = tokenizer.apply_chat_template([turns, conversation], tokenize=False)
        row: Row = encode(text, add_special_tokens=False)
        tokens = len(row["input_ids"])
        if tokens > max_tokens:
            shared = encode(commonprefix([before, text]), add_special_tokens=False)  # noqa: RUF071
            _check_room(tokens - len(shared["input_ids"]), max_tokens)
        return {name: values[-max_tokens:] for name, values in row.items()}
    text = prompt if isinstance(prompt, str) else "\n\n".join(f"{t['role']}: {t['content']}" for t in prompt)
    row = encode(text, response)
    if len(row["input_ids"]) > max_tokens:
        _check_room(len(encode("", response)["input_ids"]), max_tokens)
        row = encode(text, response, truncation="only_first", max_length=max_tokens)
    return row


def _check_room(tokens: int, max_tokens: int) -> None:
    if tokens >= max_tokens:
        raise InputError(
            f"it has {tokens} tokens and the model reads at most {max_tokens}, so no token of the prompt fits; "
            "lower evaluate.max_new_tokens or use another model"
        )
