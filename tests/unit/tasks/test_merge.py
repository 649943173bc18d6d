"""A merged adapter is a whole model with the same numbers."""

import shutil
import sys

import pytest
import torch
from transformers import AutoTokenizer

from dpo.common.errors import InputError
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.tokenization import encode_pairs
from dpo.training.settings import LoraSettings
from dpo.training.train import add_lora, save_checkpoint
from tasks.commands import merge
from tasks.tracking.provenance import weights
from tests.support.models import make_model


def test_a_merged_model_gives_the_numbers_of_base_and_adapter(tiny_model_dir, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    pair = {"id": "1", "prompt": "Say something.", "chosen": "A joy.", "rejected": "A bore, alas."}
    rows = encode_pairs([pair], tokenizer, 100)
    model = load_model(tiny_model_dir)
    before = sequence_logps(model, rows, 500)
    add_lora(model.model, LoraSettings(rank=4, alpha=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_checkpoint(model, tokenizer, tmp_path / "adapter", {"seed": 3})
    monkeypatch.setattr(sys, "argv", ["merge", str(tmp_path / "adapter"), str(tmp_path / "whole")])
    merge.main()
    merged = sequence_logps(load_model(tmp_path / "whole"), rows, 500)
    torch.testing.assert_close(merged, sequence_logps(model, rows, 500), rtol=1e-5, atol=1e-4)
    assert (merged - before).abs().max() > 0.1
    with pytest.raises(InputError, match="exists; name a new folder"):
        merge.main()


def test_a_whole_model_is_refused(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["merge", str(tiny_model_dir), str(tmp_path / "whole")])
    with pytest.raises(InputError, match=r"trained without dpo\.lora is whole already"):
        merge.main()


def test_an_adapter_is_not_merged_into_other_weights_than_its_own(tiny_model_dir, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    model = load_model(tmp_path / "base")
    add_lora(model.model, LoraSettings(rank=4, alpha=8))
    facts = {"models": {str(tmp_path / "base"): weights(tmp_path / "base")}}
    save_checkpoint(model, tokenizer, tmp_path / "adapter", facts)
    make_model("llama", tmp_path / "base", seed=5)
    monkeypatch.setattr(sys, "argv", ["merge", str(tmp_path / "adapter"), str(tmp_path / "whole")])
    with pytest.raises(InputError, match=rf"trained on other weights than those now in {tmp_path / 'base'}"):
        merge.main()
    assert not (tmp_path / "whole").exists()
