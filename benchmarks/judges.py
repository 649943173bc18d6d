"""Compare the default judges with the people who rated the default data: `python -m benchmarks.judges`.

The sentences are those of `data.source: default` that are in no pair, and that `ridge_rating` is not fitted to.
The held-out pairs are those of the seed in params.yaml, before the data contract.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.page import put_table
from dpo.common.bundled import RATINGS_SDIST, fetch
from dpo.common.files import write_json
from dpo.config import load_params
from dpo.data.human_ratings import WORDS, rating_pairs, read_ratings
from dpo.evaluation.bootstrap import bootstrap, mean
from dpo.evaluation.judges.rated_sentences import ridge_rating, unpaired
from dpo.evaluation.judges.scorer import ScoreFunction, vader_compound

RESULTS = Path("benchmarks/results/judges.json")
PAGE = Path("docs/guides/evaluation.md")
JUDGES: dict[str, ScoreFunction] = {"vader_compound": vader_compound, "ridge_rating": ridge_rating}


def main() -> None:
    """Write the correlation with ratings and the accuracy on held-out pairs of both judges."""
    params = load_params()
    with tempfile.TemporaryDirectory() as folder:
        domains = read_ratings(fetch(RATINGS_SDIST, Path(folder), source=True))
    gap, share = params.data.min_rating_gap, params.data.eval_fraction
    pairs = rating_pairs(domains, min_rating_gap=gap, eval_fraction=share, seed=params.seed)
    paired = {*pairs["chosen"], *pairs["rejected"]}
    held_out = pairs[pairs["split"] == "eval"]
    fitted = [each.text for each in unpaired(domains)]
    rest = {
        domain: [each for each in rated if len(each.text.split()) in WORDS and each.text not in paired]
        for domain, rated in domains.items()
    }
    texts = [each.text for rated in rest.values() for each in rated]
    ratings = np.array([each.mean for rated in rest.values() for each in rated])
    names = np.array([domain for domain, rated in rest.items() for _ in rated])
    result: dict[str, Any] = {
        "sentences": len(texts),
        "held_out_pairs": len(held_out),
        "fitted_sentences": len(fitted),
        "fitted_sentences_inside_a_paired_one": inside(fitted, paired),
    }
    lines = ["| judge | r | " + " | ".join(f"r, {domain}s" for domain in rest) + " | accuracy on held-out pairs |"]
    lines.append("| --- |" + " ---: |" * (len(rest) + 2))
    for name, function in JUDGES.items():
        scores = np.asarray(function([""] * len(texts), texts))
        chosen, rejected = (
            np.asarray(function([""] * len(held_out), held_out[side].tolist())) for side in ("chosen", "rejected")
        )
        found: Any = bootstrap(
            {"accuracy": mean((np.sign(chosen - rejected) + 1) / 2)}, held_out["prompt"].tolist(), params.seed
        )
        r = {
            domain: float(np.corrcoef(scores[mask], ratings[mask])[0, 1])
            for domain, mask in {"all": names == names, **{each: names == each for each in rest}}.items()
        }
        result[name] = {"r": r, **found}
        low, high = found["accuracy_ci"]
        cells = [f"`{name}`", *(f"{value:.2f}" for value in r.values())]
        lines.append(f"| {' | '.join(cells)} | {found['accuracy']:.3f} [{low:.3f}, {high:.3f}] |")
    write_json(RESULTS, result)
    put_table(PAGE, "judges", "\n".join(lines))


def inside(texts: list[str], others: set[str]) -> int:
    """Return how many texts are a part of one of the others, regardless of case."""
    everything = "\n".join(sorted(others)).casefold()
    return sum(text.casefold() in everything for text in texts)


if __name__ == "__main__":
    main()
