"""Loading of models and tokenizers: weights only from safetensors, and never code that comes with a model."""

from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo.common.errors import InputError, TransientError


def load_tokenizer(
    source: str | Path, revision: str | None = None, gguf_file: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, of a GGUF file in a folder, or of a hub id with a revision.

    Raises:
        InputError: it is missing, unreadable, or needs its own code.
        TransientError: the hub is unreachable.
    """
    try:
        return AutoTokenizer.from_pretrained(
            source, revision=revision or "main", gguf_file=gguf_file, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise _load_error(source, error) from error


def load_weights(kind: Any, source: str | Path, revision: str | None = None, **options: Any) -> Any:
    """Return `kind.from_pretrained(source)` in fp32, unless `options` sets another `dtype`.

    `kind` is an Auto class of transformers or peft, `source` a folder or a hub id with a revision.

    Raises:
        InputError: the model is missing, unreadable, has no safetensors, or needs its own code.
        TransientError: the hub is unreachable.
    """
    adapter, weights = (Path(source) / f"adapter_{name}" for name in ("config.json", "model.safetensors"))
    if adapter.is_file() and not weights.is_file():  # peft would load a pickle instead
        raise _load_error(source, FileNotFoundError(f"it has no {weights.name}"))
    safe = {"revision": revision or "main", "trust_remote_code": False, "use_safetensors": True}
    try:
        return kind.from_pretrained(source, **{"dtype": "float32", **options, **safe})
    except (OSError, ValueError, SafetensorError) as error:
        raise _load_error(source, error) from error


def _load_error(source: str | Path, error: Exception) -> Exception:
    """Return the error to raise for a model or a tokenizer that was not loaded."""
    reason = str(error)
    if isinstance(error.__cause__, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE:
        return TransientError(f"cannot load '{source}': {reason}")
    pickles = sorted(
        f.name for f in Path(source).glob("*") if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    )
    if "trust_remote_code" in reason:
        reason = (
            "it needs its own code, which is never run; use a model whose architecture is part of transformers"
        )
    elif pickles and "safetensors" in reason:
        reason = (
            f"its weights are a pickle ({', '.join(pickles)}), which can run code when it is loaded; convert them "
            "to safetensors, the format that `save_pretrained` writes"
        )
    return InputError(f"cannot load '{source}': {reason}")
