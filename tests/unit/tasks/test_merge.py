"""`dpo merge`."""

import shutil

import pytest
import torch
from transformers import AutoTokenizer

from dpo.common.errors import InputError
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.tokenization import encode_pairs
from dpo.training.settings import LoraSettings
from dpo.training.train import add_lora, save_checkpoint
from tasks.commands.merge import merge
from tasks.tracking.provenance import weights
from tests.support.models import make_model


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_merged_model_has_the_log_probs_of_base_and_adapter(tiny_model_dir, tmp_path, architecture):
    """The head of the tiny Llama is tied to its embedding, that of the tiny Qwen2 is not."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base = make_model(architecture, tmp_path / "base", vocab_size=len(tokenizer), max_position_embeddings=512)
    pair = {"id": "1", "prompt": "Say something.", "chosen": "A joy.", "rejected": "A bore, alas."}
    rows = encode_pairs([pair], tokenizer, 100)
    model = load_model(base)
    before = sequence_logps(model, rows, 500)
    add_lora(model.model, LoraSettings(rank=4, alpha=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_checkpoint(model, tokenizer, tmp_path / "adapter", {"seed": 3})
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = sequence_logps(load_model(tmp_path / "merged"), rows, 500)
    torch.testing.assert_close(merged, sequence_logps(model, rows, 500), rtol=1e-5, atol=1e-4)
    assert (merged - before).abs().max() > 0.1
    with pytest.raises(InputError, match="exists; name a new folder"):
        merge(tmp_path / "adapter", tmp_path / "merged")


def test_a_checkpoint_that_is_not_an_adapter_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(InputError, match=r"trained without dpo\.lora needs no merge"):
        merge(tiny_model_dir, tmp_path / "merged")


def test_an_adapter_whose_base_has_changed_is_refused(tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    model = load_model(tmp_path / "base")
    add_lora(model.model, LoraSettings(rank=4, alpha=8))
    facts = {"models": {str(tmp_path / "base"): weights(tmp_path / "base")}}
    save_checkpoint(model, tokenizer, tmp_path / "adapter", facts)
    make_model("llama", tmp_path / "base", seed=5)
    with pytest.raises(InputError, match=rf"the weights in {tmp_path / 'base'} are not those it was trained on"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
