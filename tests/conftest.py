"""Tiny random models and tokenizers, made here so that no test needs a network; and free ports."""

import os
from pathlib import Path

# Tiny models run slower on several threads. This also applies to the stages that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# Stages that tests start would compile every module of the project again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest

from tests.support.models import chat_tokenizer, make_model


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A random Llama of two layers with `chat_tokenizer`."""
    tokenizer = chat_tokenizer()
    folder = make_model(
        "llama",
        tmp_path_factory.mktemp("tiny") / "model",
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    tokenizer.save_pretrained(folder)
    return folder
