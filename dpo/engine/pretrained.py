"""Loading of models and tokenizers: weights only from safetensors, and never code that comes with a model."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from dpo.common.errors import InputError, TransientError
from dpo.common.files import PROVENANCE, sha256

# bitsandbytes, which peft imports, warns about an optional kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER, REFERENCE_ADAPTER = "default", "reference"
"""Names of a model's own adapter, which is that of transformers, and of a second one, that of the reference."""


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
    safe = {"revision": revision or "main", "trust_remote_code": False, "use_safetensors": True}
    try:
        return kind.from_pretrained(source, **{"dtype": "float32", **options, **safe})
    except (OSError, ValueError, SafetensorError) as error:
        raise _load_error(source, error) from error


def load_config(folder: Path) -> Any:
    """Load the configuration of a model folder, or of the base model of an adapter.

    Raises:
        InputError: it is missing or unreadable.
    """
    return load_weights(AutoConfig, *((folder,) if (folder / "config.json").is_file() else adapter_base(folder)))


def checkpoint_dtype(source: str | Path, revision: str | None = None) -> str:
    """Return `bfloat16` or `float16` if all weights of a folder or hub id have this data type, else `float32`."""
    place = {"revision": revision or "main"}
    find = {**place, "_raise_exceptions_for_missing_entries": False}
    kinds: set[str] = set()
    try:
        files = [cached_file(str(source), SAFE_WEIGHTS_NAME, **find)]
        if files == [None] and (index := cached_file(str(source), SAFE_WEIGHTS_INDEX_NAME, **find)):
            files, _ = get_checkpoint_shard_files(str(source), index, **place)
        for file in filter(None, files):
            with safe_open(file, "pt") as weights:
                kinds |= {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return "float32"  # loading the weights reports the fault
    names = {"BF16": "bfloat16", "F16": "float16"}
    return names.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def load_causal_lm(folder: Path, **options: Any) -> PreTrainedModel:
    """Load a model folder like `load_weights`. A LoRA adapter is loaded on top of its base model, not merged.

    Raises:
        InputError: model, adapter or base model are missing, unreadable, or do not fit each other.
        TransientError: the hub is unreachable.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return load_weights(AutoModelForCausalLM, folder, **options)
    if (folder / "config.json").is_file():  # a base model and its adapter in one folder
        _check_adapter(folder)
        model = load_weights(AutoModelForCausalLM, folder, **options)
        _load_magnitudes(model, folder)
        return model
    model = load_weights(AutoModelForCausalLM, *adapter_base(folder), **options)
    load_adapter(model, folder)
    return model


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Load the LoRA adapter in a folder into a model, in place. It replaces the model's own adapter.

    Raises:
        InputError: the adapter is no LoRA adapter, or does not fit the model.
    """
    _check_adapter(folder)
    try:
        with adapters_in_fp32(model):
            info = model.load_adapter(str(folder), ADAPTER, hotswap=has_adapter(model))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: the adapter does not fit its base model: {error}") from error
    dora = _load_magnitudes(model, folder)
    faults = sorted({*info.missing_keys, *info.unexpected_keys} - dora)
    if faults:
        raise InputError(f"{folder}: the adapter does not fit its base model: {len(faults)} weights, {faults[0]}")


def add_reference_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Load the LoRA adapter in a folder as `REFERENCE_ADAPTER` beside the model's own, which stays active.

    `load_adapter` of transformers would report the weights of the first adapter as missing.
    """
    from peft import PeftConfig, set_peft_model_state_dict

    weights = load_file(folder / "adapter_model.safetensors")
    with adapters_in_fp32(model):
        model.add_adapter(PeftConfig.from_pretrained(str(folder)), REFERENCE_ADAPTER)
    named = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
    loaded: Any = set_peft_model_state_dict(model, named, REFERENCE_ADAPTER)
    unknown = loaded.unexpected_keys
    if unknown:
        raise InputError(
            f"{folder}: the adapter does not fit its base model: {len(unknown)} weights, {unknown[0]}"
        )
    model.set_adapter(ADAPTER)
    model.requires_grad_(False)


@contextmanager
def adapters_in_fp32(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, weights in bf16 look like fp32 weights, so that peft creates adapters of them in fp32.

    So do weights without data, on the CPU, so that their adapters have data.
    """
    places = [(module._parameters, name) for module in model.modules() for name in module._parameters]
    weights = [(group, name, weight) for group, name in places if (weight := group[name]) is not None]
    empty = [each for each in weights if each[2].is_meta]
    held = [(w, w.data) for w in model.parameters() if w.dtype == torch.bfloat16 and not w.is_meta]
    for weight, data in held:
        weight.data = torch.zeros((), device=data.device).expand(data.shape)
    for group, name, weight in empty:
        group[name] = nn.Parameter(torch.zeros(()).expand(weight.shape), weight.requires_grad)
    try:
        yield
    finally:
        for weight, data in held:
            weight.data = data
        for group, name, weight in empty:
            group[name], shown = weight, group[name]
            weight.requires_grad_(shown is not None and shown.requires_grad)


@torch.no_grad()
def _load_magnitudes(model: PreTrainedModel, folder: Path) -> set[str]:
    """Load the magnitudes of a DoRA adapter, which transformers does not load. Return their names in the model.

    Names without and with the suffix that peft removes from files are returned.
    """
    loaded: set[str] = set()
    weights = dict(model.named_parameters())
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        if name.endswith("lora_magnitude_vector"):
            place = f"{name.removeprefix('base_model.model.')}.{ADAPTER}"
            if f"{place}.weight" in weights:
                weights[f"{place}.weight"].copy_(value)
                loaded |= {place, f"{place}.weight"}
    return loaded


def _check_adapter(folder: Path) -> None:
    """Raise InputError if the adapter in a folder is no LoRA adapter or has no safetensors."""
    kind = read_adapter_config(folder).get("peft_type")
    if kind != "LORA":
        raise InputError(f"{folder / ADAPTER_CONFIG}: peft_type is {kind!r}; only LORA is supported")
    if not (folder / "adapter_model.safetensors").is_file():  # peft would load a pickle instead
        raise _load_error(folder, FileNotFoundError("it has no adapter_model.safetensors"))


def has_adapter(model: PreTrainedModel) -> bool:
    """Return whether a model has a LoRA adapter."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the content of `adapter_config.json`.

    Raises:
        InputError: the file is missing or unreadable.
    """
    try:
        return dict(json.loads((folder / ADAPTER_CONFIG).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder / ADAPTER_CONFIG}: not a readable adapter configuration: {error}") from error


def adapter_base(folder: Path) -> tuple[str | Path, str | None]:
    """Return the base model of the adapter in a folder: a folder, or a hub id with its revision.

    The base of an adapter of this pipeline is in its `provenance.json`. A relative path is searched in the current
    folder, then beside the adapter, so that both folders can be moved together.

    Raises:
        InputError: the adapter names a folder that does not exist.
    """
    config, own = read_adapter_config(folder), None
    if (folder / PROVENANCE).is_file():
        own = json.loads((folder / PROVENANCE).read_text()).get("adapter_of")
    name = str(config.get("base_model_name_or_path") or "")
    on_hub = is_hub_id(name) and name != own
    for place in filter(None, (own, name)):
        beside = [] if on_hub and place == name else [folder.resolve().parent / Path(place).name]
        for path in (Path(place), *beside):
            if (path / "config.json").is_file():
                return path, None
    if on_hub:
        return name, config.get("revision")
    raise InputError(
        f"{folder}: its base model {own or name!r} is neither in {Path.cwd()} nor beside it; copy the base "
        "model's folder beside it, or run `dpo merge` in the project, which writes a model that loads anywhere"
    )


def weights_digest(folder: Path) -> str:
    """Return the hash of the files with the weights of a model folder, and of the base model of an adapter."""
    digest = sha256(*sorted(folder.glob("*.safetensors")))
    if (folder / "config.json").is_file():
        return digest
    base, revision = adapter_base(folder)
    return f"{digest} on {weights_digest(base) if isinstance(base, Path) else f'{base}@{revision}'}"


def is_hub_id(name: str) -> bool:
    """Return whether a name of a model that is not an existing path can be a hub id, OWNER/NAME."""
    return name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()


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
