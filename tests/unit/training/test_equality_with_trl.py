"""Ten steps of training equal those of TRL's DPOTrainer."""

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.tokenization import encode_pairs
from dpo.training.train import train_dpo
from tests.support.models import plain_tokenizer
from tests.support.training import (
    dpo_params,
    make_pairs,
    steps_of,
    trial,
)


class OrderedDPOTrainer(DPOTrainer):
    """TRL's trainer with an unshuffled dataset and our warm-up."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        def factor(step):
            warmup = self.args.warmup_steps
            if step < warmup:
                return (step + 1) / (warmup + 1)
            if self.args.lr_scheduler_type == "constant":
                return 1.0
            return (num_training_steps - step) / (num_training_steps - warmup)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def _get_train_sampler(self, dataset=None):
        return torch.utils.data.SequentialSampler(dataset or self.train_dataset)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 1.0},
        {"optimizer": "rmsprop", "schedule": "linear", "warmup_ratio": 0.3, "max_grad_norm": 10.0},
    ],
)
def test_ten_steps_equal_those_of_trl(tiny_model_dir, tmp_path, changes):
    beta, seed = 0.3, 5
    tokenizer = plain_tokenizer()
    pairs = make_pairs(40)
    rows = encode_pairs(pairs, tokenizer, 400)
    model = load_model(tiny_model_dir)
    table = sequence_logps(model, rows, 1000).tolist()
    reference = {row.id: tuple(logps) for row, logps in zip(rows, table, strict=True)}
    params, point = dpo_params(**changes), trial(beta, 3e-4, seed)
    ours = train_dpo(model, rows, reference, params, point, max_tokens_per_microbatch=100)

    by_id = {pair["id"]: pair for pair in pairs}
    order = [by_id[row.id] for step in steps_of(rows, seed) for row in step]
    trainer = OrderedDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(tmp_path),
            beta=beta,
            per_device_train_batch_size=4,
            num_train_epochs=1,
            learning_rate=point.learning_rate,
            optim={"adamw": "adamw_torch", "rmsprop": "rmsprop"}[params.optimizer],
            lr_scheduler_type=params.schedule,
            warmup_steps=round(10 * params.warmup_ratio),
            max_grad_norm=params.max_grad_norm,
            weight_decay=0.0,
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_list([{k: v for k, v in p.items() if k != "id"} for p in order]),
        processing_class=tokenizer,
    )
    trainer.train()
    theirs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(theirs) == len(ours) == 10
    assert abs(ours[-1]["rewards/margins"]) > 0.1
    for name in ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "learning_rate"):
        assert [e[name] for e in ours] == pytest.approx([e[name] for e in theirs], rel=1e-4, abs=1e-4), name
    for (name, weight), trained in zip(model.model.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(weight, trained, rtol=0, atol=1e-4, msg=name)
