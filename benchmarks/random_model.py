"""Models with random weights, created on the device: benchmarks need their shapes only, and no download."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.cases import SEED

OURS, PEER = "dpo.engine.logprobs.load_causal_lm", "trl.trainer.dpo_trainer.create_model_from_path"
"""The functions with which our engine and TRL load weights."""


def save_shape(config: LlamaConfig, folder: Path) -> None:
    """Save a config without weights, and a tokenizer whose words are the numbers of the tokens."""
    config.save_pretrained(folder)
    words = {"<end>": 0, **{str(number): number for number in range(1, config.vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(folder)


def random_model(folder: str | Path, **options: Any) -> Any:
    """Return a model with the config in a folder and random weights on the GPU, or on the CPU without one.

    `options` are those of `from_pretrained`. The weights are values in bf16, the same for every `dtype`. TF32 is
    disabled, so that a check of the model on the device is exact.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(SEED)
    with device:
        weights = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    options = {"dtype": "float32", "device_map": {"": device}, **options}
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, **options)


def on_random_weights(loader: str, function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, with `random_model` in place of `loader`, which is `OURS` or `PEER`."""
    with patch(loader, random_model):
        return function(*args)
