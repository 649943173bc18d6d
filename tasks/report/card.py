"""Model cards of policies."""

import dataclasses
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Template

from dpo.common.bundled import MODEL_NAME
from dpo.common.files import atomic_write, md5
from dpo.config import Params
from dpo.engine.pretrained import ADAPTER_CONFIG, read_adapter_config
from dpo.training.settings import Trial
from tasks.common.paths import BASE, EVAL, REFERENCE, TRAIN, model_card, policy_folder
from tasks.tracking.provenance import weights

METRICS = {
    "reward_accuracy": "reward accuracy on held-out pairs",
    "margin": "margin on held-out pairs",
    "win_rate": "win rate against the reference",
    "base_win_rate": "win rate against the base model",
    "judge_accuracy": "accuracy of the judge on held-out pairs",
    "length_controlled_win_rate": "length-controlled win rate",
    "kl": "KL to the reference, nats per response",
    "perplexity_ratio": "perplexity of held-out completions, relative to the reference",
    "perplexity": "perplexity of held-out completions",
    "base_perplexity": "perplexity of held-out completions, base model",
    "length_ratio": "tokens per response, relative to the reference",
}


def write_card(params: Params, trial: Trial, metrics: dict[str, Any]) -> None:
    """Write a policy's model card in the hub's format: metadata in YAML, then Markdown."""
    judges = [judge.name for judge in params.evaluate.judges]
    shown = {name: words for name, words in METRICS.items() if name in metrics}
    shown |= {f"win_rate/{judge}": f"win rate against the reference, judged by {judge}" for judge in judges[1:]}
    base = MODEL_NAME if params.model.base == "default" else params.model.base
    rows = "labelled rows" if "labels" in trial.loss.needs else "pairs"
    shown = {name: words.replace("held-out pairs", f"held-out {rows}") for name, words in shown.items()}
    dataset = ("text-generation", "preferences", f"{params.data.origin}, held-out {rows}")
    folder = policy_folder(trial)
    adapter = read_adapter_config(folder) if (folder / ADAPTER_CONFIG).is_file() else None
    data = ModelCardData(
        base_model=base if params.model.base == "default" or params.model.revision else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["dpo", "preference-optimization", trial.objective],
        model_name=trial.name,
        eval_results=[EvalResult(*dataset, name, metrics[name], metric_name=text) for name, text in shown.items()],
    )
    template = Template(Path(__file__).with_name("card.md.jinja").read_text(), trim_blocks=True)
    body = template.render(
        base=base,
        source=params.data.origin,
        trial=trial,
        sft=params.sft,
        adapter=adapter,
        metrics=metrics,
        rows=rows,
        shown=shown,
        interval=lambda ends: f"{ends[0]:.3f} to {ends[1]:.3f}",
        evaluate=params.evaluate,
        judge=judges[0] if judges else None,
        settings=trial.settings | dataclasses.asdict(params.dpo),
        hashes={f"{path} (MD5)": md5(path) for path in (TRAIN, EVAL)}
        | {f"{path} (SHA-256)": weights(path) for path in (BASE, REFERENCE, folder)},
    )
    with atomic_write(model_card(trial)) as tmp:
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(tmp)
