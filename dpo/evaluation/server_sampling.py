"""Sampling of responses by a server: vLLM, which the stage starts, or any OpenAI-compatible server."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
from accelerate.utils import broadcast_object_list
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from dpo.common.distributed import this_process
from dpo.common.errors import InputError
from dpo.engine.chat import Prompt, end_tokens
from dpo.engine.pretrained import ADAPTER_CONFIG, adapter_base
from dpo.engine.settings import EngineSettings
from dpo.engine.tokenization import encode_continuation, prompt_ids
from dpo.evaluation.endpoint import Endpoint
from dpo.evaluation.sampling import as_table, end_ids
from dpo.evaluation.settings import OpenaiSampler, SamplerSettings, VllmSampler
from dpo.evaluation.vllm_server import NAME, vllm_server

WHERE = "params.yaml: evaluate.sampler"
MAX_DEVIATIONS, MAX_SURPRISE = 6.0, 0.02
"""Limits of `check_sampled`: standard errors, and nats per token. Rounding in bf16 stays below the second one."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Reply:
    """A response as token ids, or as text if the server returns no ids, and whether it ended by itself."""

    content: list[int] | str
    finished: bool


def served_responses(
    sampler: SamplerSettings,
    engine: EngineSettings,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Mapping[str, int],
) -> pd.DataFrame | None:
    """Sample one response per prompt from the checkpoint in `folder`, by the server that `sampler` names.

    `sampling` has the arguments of `dpo.evaluation.sampling.response_table`. Call it before the model is loaded:
    vLLM needs the memory. With several processes, the main one samples.

    Returns:
        The table of `dpo.evaluation.sampling.response_table`, or None if the stage samples in its own process.

    Raises:
        InputError: the server does not start or rejects a request, or its reply is not a completion of this model.
        TransientError: the server does not reply.
    """
    if not isinstance(sampler, VllmSampler | OpenaiSampler):
        return None
    table = None
    if this_process().is_main_process:
        is_adapter = (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()
        base, revision = adapter_base(folder) if is_adapter else (folder, None)
        ends = end_ids(_generation_config(base, revision), tokenizer)
        requests = _requests(tokenizer, prompts, ends, sampling)
        if isinstance(sampler, VllmSampler):
            with vllm_server(folder, sampler, engine, WHERE) as endpoint:
                replies = _ask(endpoint, NAME, requests, sampler.parallel)
        else:
            name = sampler.model.replace("{name}", folder.name)
            replies = _ask(openai_endpoint(sampler), name, requests, sampler.parallel)
        responses = [_tokens(reply, tokenizer, ends) for reply in replies]
        vocabulary = AutoConfig.from_pretrained(base, revision=revision).get_text_config().vocab_size
        if max(map(max, responses)) >= vocabulary:
            raise InputError(f"{WHERE}: the server returned tokens that {folder} does not have; serve {folder}")
        table = as_table(responses, tokenizer, ends)
    return broadcast_object_list([table])[0]


def openai_endpoint(sampler: OpenaiSampler) -> Endpoint:
    """Return the endpoint of a server. Raise InputError if its address or its key is invalid."""
    return Endpoint(
        sampler.base_url,
        "completions",
        WHERE,
        "SAMPLER_API_KEY",
        fixes={
            400: "use a server whose /v1/completions accepts token ids, as vLLM's does",
            404: "serve the checkpoint under this name, or correct model or base_url, which usually ends in /v1",
        },
        after="run the stage again later, or lower `parallel`",
    )


def check_sampled(scores: pd.DataFrame, lengths: Sequence[int], folder: Path) -> None:
    """Check that responses are samples at temperature 1 from the model that scored them.

    `scores` has `policy_logp` and `entropy` of each response in nats, as `dpo.evaluation.kl.divergence` returns
    them; `lengths` are their tokens. The surprise -log pi(y|x) minus the entropy is a sum of martingale
    differences, so its mean is 0 for samples from the model. Another model, temperature, top-p or a penalty
    changes the mean.

    Raises:
        InputError: the mean differs from 0 significantly and by more than rounding.
    """
    excess = -(scores["policy_logp"] + scores["entropy"]).to_numpy(float)
    per_token = excess.sum() / sum(lengths)
    deviations = excess.mean() / max(excess.std() / len(excess) ** 0.5, 1e-9)
    if abs(per_token) > MAX_SURPRISE and abs(deviations) > MAX_DEVIATIONS:
        raise InputError(
            f"{WHERE}: the responses are not samples from {folder} at temperature 1: their surprise differs from "
            f"the entropy by {per_token:.3f} nats per token, {abs(deviations):.0f} standard errors; serve this "
            "checkpoint, unquantised and without sampling settings of the server"
        )


def _generation_config(base: str | Path, revision: str | None) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(base, revision=revision)
    except OSError:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(base, revision=revision))


def _requests(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], ends: Sequence[int], sampling: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return one request per prompt, as token ids, at temperature 1, with a seed of its own.

    The fields beyond OpenAI's are those of vLLM: they disable what a server may enable, and request token ids.
    """
    fields = {
        "max_tokens": sampling["max_new_tokens"],
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(ends),
        "return_token_ids": True,  # nosec B105  # the name of a field
    }
    rows = prompt_ids(tokenizer, prompts, sampling["max_prompt_tokens"])
    return [{**fields, "prompt": ids, "seed": _seed(sampling["seed"], row)} for row, ids in enumerate(rows)]


def _seed(seed: int, row: int) -> int:
    """Return a number from 0 to 2^31 - 1."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:4]) >> 1


def _ask(endpoint: Endpoint, model: str, requests: Sequence[dict[str, Any]], parallel: int) -> list[_Reply]:
    """Return the replies to requests. Warn if they are texts."""
    replies: dict[int, _Reply] = {}

    def ask(client: httpx.Client, row: int) -> None:
        replies[row] = _read(endpoint, endpoint.post(client, {"model": model, **requests[row]}))

    endpoint.for_each(range(len(requests)), ask, parallel, "responses", "response")
    texts = sum(isinstance(reply.content, str) for reply in replies.values())
    if texts:
        log.warning(
            "%s: %d of %d responses came without `token_ids`; their text is tokenized, which can give "
            "other tokens than the sampled ones, so their log-probs, KL and implicit rewards are approximate",
            *(WHERE, texts, len(requests)),
        )
    return [replies[row] for row in range(len(requests))]


def _read(endpoint: Endpoint, text: str) -> _Reply:
    """Return the response in the body of a completion."""
    try:
        choice = json.loads(text)["choices"][0]
        finished, ids, content = choice["finish_reason"] == "stop", choice.get("token_ids"), choice["text"]
    except (ValueError, LookupError, TypeError, AttributeError):
        finished = ids = content = None
    if isinstance(ids, list) and all(isinstance(token, int) and token >= 0 for token in ids):
        return _Reply(ids, bool(finished))
    if isinstance(content, str):
        return _Reply(content, bool(finished))
    fault = f"the reply of {endpoint.url} is not a completion: {endpoint.excerpt(text)!r}"
    raise InputError(f"{WHERE}: {fault}; correct base_url, which usually ends in /v1")


def _tokens(reply: _Reply, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[int]:
    """Return the tokens of a response up to its first end token, which is added if the server left it out."""
    content = reply.content
    ids = encode_continuation(tokenizer, content) if isinstance(content, str) else content
    length = next((place for place, token in enumerate(ids, 1) if token in ends), None)
    if length is None and (reply.finished or not ids):
        end = [*tokenizer.convert_tokens_to_ids(list(end_tokens(tokenizer))), *ends][:1]
        if not end:
            raise InputError(f"{WHERE}: the server ended a response, but the tokenizer has no end token")
        return [*ids, *end]
    return ids[:length]
