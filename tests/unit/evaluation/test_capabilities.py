"""Paired results of benchmark tasks, by hand, and a local task of lm_eval on a tiny model."""

import pandas as pd
import pytest

from dpo.common.errors import InputError
from dpo.evaluation.capabilities import answers, compare_answers, drop
from tests.support.capabilities import NAME, ROWS, write_task


def results(values, better=True):
    table = pd.DataFrame({"id": [f"t/{i}" for i in range(len(values))], "acc": values})
    table.attrs["higher_is_better"] = {"acc": better}
    return table


def test_models_are_compared_on_the_same_examples():
    policy, reference = results([1.0, 0.0, 0.0, 1.0] * 10), results([1.0, 1.0, 0.0, 1.0] * 10)
    shuffled = reference.sample(frac=1, random_state=0)
    found = compare_answers({"mine": policy, "reference": shuffled}, "mine", 0)
    assert (found["metric"], found["examples"]) == ("acc", 40)
    assert found["models"]["mine"]["value"] == 0.5
    assert found["models"]["reference"]["value"] == 0.75
    difference = found["differences"]["reference"]
    assert difference["difference"] == -0.25
    low, high = difference["difference_ci"]
    assert low < -0.25 < high < 0
    assert difference["p"] == pytest.approx(2 / 2**10)
    assert drop(found, "reference") == 0.25
    worse = compare_answers(
        {"mine": results([3.0, 4.0], False), "reference": results([1.0, 1.0], False)}, "mine", 0
    )
    assert drop(worse, "reference") == 2.5, "a rise of a metric that is better if low is a fall"


@pytest.mark.slow
def test_a_local_task_runs_offline_and_agrees_with_the_log_probs(tmp_path, monkeypatch, tiny_model_dir):
    pytest.importorskip("lm_eval", reason="lm_eval: installed with the capabilities extra")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    found = answers(model, tokenizer, NAME, None)

    def logp(text, answer):
        start = len(tokenizer(text).input_ids)
        ids = tokenizer(text + answer, return_tensors="pt").input_ids
        with torch.no_grad():
            logps = model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
        return logps.gather(1, ids[0, start:, None]).sum().item()

    texts = [f"Question: {row['question']} Answer:" for row in ROWS]
    expected = [float((logp(text, " no") > logp(text, " yes")) == (row["label"] == 1))
                for text, row in zip(texts, ROWS, strict=True)]  # fmt: skip
    assert found.set_index("id").sort_index()["acc"].tolist() == expected
    assert len(answers(model, tokenizer, NAME, 3)) == 3
    with pytest.raises(InputError, match=r"capabilities\.tasks: 'no_such_task' is neither a task of lm_eval nor"):
        answers(model, tokenizer, "no_such_task", None)
