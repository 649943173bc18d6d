"""How models and tokenizers are read: weights as safetensors alone, and no code that comes with them."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo.common.errors import InputError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load_tokenizer(
    source: str | Path, revision: str | None = None, gguf_file: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or of a GGUF file in it, or of a hub id with its revision.

    Raises:
        InputError: it is not there, cannot be read, or needs code of its own.
    """
    try:
        return AutoTokenizer.from_pretrained(
            source, revision=revision or "main", gguf_file=gguf_file, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise InputError(_why(source, error)) from error


def load_weights(kind: Any, source: str | Path, revision: str | None = None, **options: Any) -> Any:
    """What `kind.from_pretrained` gives, in fp32 unless `options` has a `dtype`.

    Args:
        kind: an Auto class of transformers or peft.
        source: a folder, or a hub id with its revision.
        revision: of a hub id.
        options: for `from_pretrained`.

    Raises:
        InputError: it is not there, cannot be read, has no safetensors, or needs code of its own.
    """
    adapter, weights = (Path(source) / f"adapter_{name}" for name in ("config.json", "model.safetensors"))
    if adapter.is_file() and not weights.is_file():  # peft would take a pickle for want of it
        raise InputError(_why(source, f"it has no {weights.name}"))
    safe = {"revision": revision or "main", "trust_remote_code": False, "use_safetensors": True}
    try:
        return kind.from_pretrained(source, **{"dtype": torch.float32, **options, **safe})
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(_why(source, error)) from error


def _why(source: str | Path, error: object) -> str:
    """Why a model or a tokenizer was not read, with the mend."""
    reason = str(error)
    pickles = sorted(file.name for kind in PICKLES for file in Path(source).glob(kind))
    if "trust_remote_code" in reason:
        reason = (
            "it needs code that comes with it, which is never run; name a model whose architecture is part of "
            "transformers"
        )
    elif pickles and "safetensors" in reason:
        reason = (
            f"its weights are a pickle ({', '.join(pickles)}), which can run code when it is read; bring them as "
            "safetensors, the format in which `save_pretrained` writes"
        )
    return f"cannot load '{source}': {reason}"
