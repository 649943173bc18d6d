"""A small plan of the evidence and results of its cases."""

from ruamel.yaml import YAML

from tests.support.project import ROOT

METHODS = ["online-1", "online-2", "rloo-2", "best-of-2", "sigmoid", "sft"]
TEXT_RULES = ("mojibake", "control_characters", "special_tokens", "rendered_text")


def read(path):
    return YAML(typ="safe").load(path.read_text())


def tiny_plan(folder, **changes):
    """Write a plan of every method for a tiny model, and return its path. `changes` are settings of its group."""
    group = {"task": "tiny", "methods": METHODS, "betas": [0.1], "learning_rates": [0.01], "seeds": [3], **changes}
    comparison = {"group": "all", "better": "online-2", "worse": "online-1", "judge": "vader_compound"}
    comparison |= {"kl": 0.001, "other_kls": [0.002]}
    task = read(ROOT / "benchmarks/evidence/sentences.yaml") | {
        "model": {"base": "models/own/tiny"},
        "data": {"source": "data/own/pairs.jsonl", "eval_fraction": 0.3},
        "validate": {"max_quarantined": 1.0, "rules": dict.fromkeys(TEXT_RULES, "warn")},
        "sft": {"completions": "chosen", "max_pairs": 4, "epochs": 1, "pairs_per_step": 2, "learning_rate": 1e-3},
        "dpo": {"epochs": 1, "pairs_per_step": 4},
        "reward_model": {"pairs_per_step": 8, "learning_rate": 1e-3},
        "online": {"prompts": 8, "answers": 3},
    }
    task["sweep"] |= {"betas": [0.1], "learning_rates": [0.01], "seeds": [3, 4], "rounds": [1, 2], "rloo": [2],
                      "reward_models": [3, 4]}  # fmt: skip
    task["evaluate"] |= {
        "samples": 12,
        "kl_samples": 6,
        "max_new_tokens": 40,
        "judges": task["evaluate"]["judges"][:1],
    }
    plan = {"comparison": comparison, "groups": {"all": group}}
    for name, values in {"plan": plan, group["task"]: task}.items():
        YAML().dump(values, folder / f"{name}.yaml")
    return folder / "plan.yaml"


def entry(kl, score):
    """A result of four prompts with two responses each."""
    twice = [2.0] * 4
    prompts = {"responses": twice, "kl_responses": twice, "kl": [2 * kl] * 4}
    prompts |= {"score/vader_compound": [2 * score] * 4, "reference_score/vader_compound": [0.0] * 4}
    cost = {"flops": 2e12, "human_pairs": 9, "judged_answers": 24, "sampled_tokens": 1000}
    seconds = {"training": 60.0, "evaluation": 30.0}
    return {"metrics": {"kl": kl}, "prompts": prompts, "cost": cost, "seconds": seconds, "peak_memory_gib": 1.0}
