"""How far a policy is from its reference on answers of its own."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dpo.engine.logprobs import LogProbModel, packed_batches
from dpo.engine.packing import TokenRow


@torch.no_grad()
def divergence(
    policy: LogProbModel,
    reference: LogProbModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    max_tokens_per_microbatch: int,
) -> pd.DataFrame:
    """KL(pi || pi_ref) of answers y ~ pi, as one sum over each answer's tokens.

    At every token the whole next-token distributions are compared, sum_v pi(v|x, y_<t) log(pi(v|x, y_<t) /
    pi_ref(v|x, y_<t)); only the prefixes y_<t are sampled. The mean over answers has the expectation of the plain
    estimate log(pi(y|x) / pi_ref(y|x)) and never a larger variance (Rao-Blackwell; Amini et al. 2025, "Better
    Estimation of the KL Divergence Between Language Models"), and no answer counts less than 0.

    Args:
        policy: from `dpo.engine.logprobs.load_model`; sampled the answers.
        reference: from `dpo.engine.logprobs.load_model`, of the same architecture; both are in memory here.
        prompts: token ids, one prompt an answer; equal prompts are computed once.
        answers: token ids, at least one each.
        max_tokens_per_microbatch: most tokens in one forward pass.

    Returns:
        One row an answer: `policy_logp`, `reference_logp`, `kl` and `entropy`, nats summed over its tokens. The
        entropy is the policy's, estimated in the same way.
    """
    rows, order = _by_prompt(prompts, answers, max_tokens_per_microbatch)
    columns = ("policy_logp", "reference_logp", "kl", "entropy")
    parts = []
    with tqdm(total=len(rows), desc="KL to the reference", unit="row", mininterval=2) as bar:
        for batch in packed_batches(rows, max_tokens_per_microbatch, policy.device):
            sums = torch.zeros(batch.completions, len(columns), dtype=torch.float64)
            start = 0
            both = (model.logits(batch) for model in (policy, reference))
            for ours, theirs in zip(*both, strict=True):
                part = slice(start, start := start + len(ours))
                tokens = _compare(ours.log_softmax(1), theirs.log_softmax(1), batch.targets[part])
                sums.index_add_(0, batch.completion_index[part].cpu(), tokens.double().cpu())
            parts.append(sums)
            bar.update(len(batch.ids))
    table = pd.DataFrame(torch.cat(parts).numpy(), columns=columns)
    return table.set_axis(order).sort_index()


def _compare(policy: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    """Log-probs of both, KL and entropy [n, 4] from the log-distributions [n, vocabulary] of n tokens."""
    chosen = [logps.gather(1, targets[:, None])[:, 0] for logps in (policy, reference)]
    weights = policy.exp()
    kl = torch.einsum("nv,nv->n", weights, policy - reference).clamp_min(0)  # rounding can fall below 0
    entropy = -torch.einsum("nv,nv->n", weights, policy)
    return torch.stack([*chosen, kl, entropy], 1)


def _by_prompt(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], max_tokens_per_microbatch: int
) -> tuple[list[TokenRow], np.ndarray]:
    """Rows of one prompt and its answers, within the token budget, and each answer's number in their order."""
    waiting: dict[tuple[int, ...], list[int]] = defaultdict(list)
    groups: list[list[int]] = []
    for number, prompt in enumerate(map(tuple, prompts)):
        group = waiting[prompt]
        if group and len(prompt) + sum(len(answers[i]) for i in [*group, number]) > max_tokens_per_microbatch:
            groups.append(group)
            group = waiting[prompt] = []
        group.append(number)
    groups += waiting.values()
    rows = [
        TokenRow(str(group[0]), tuple(prompts[group[0]]), tuple(tuple(answers[i]) for i in group))
        for group in groups
    ]
    return rows, np.concatenate(groups)
