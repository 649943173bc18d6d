"""KL divergence of a policy from its reference, estimated on the policy's own responses."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dpo.common.progress import progress
from dpo.engine.logprobs import LogProbModel, packed_batches
from dpo.engine.tokenization import TokenRow

Rows = Sequence[Sequence[int]]


@torch.no_grad()
def divergence(
    policy: LogProbModel,
    reference: LogProbModel | None,
    prompts: Rows,
    responses: Rows,
    max_tokens_per_microbatch: int,
) -> pd.DataFrame:
    """Estimate KL(pi || pi_ref) on responses y ~ pi, as a sum over the tokens of each response.

    Each token contributes the KL of the full next-token distributions, sum_v pi(v|x, y_<t) log(pi(v|x, y_<t) /
    pi_ref(v|x, y_<t)); only the prefixes y_<t are sampled. The mean over responses has the expectation of the
    plain estimate log(pi(y|x) / pi_ref(y|x)) and at most its variance (Rao-Blackwell; Amini et al. 2025, "Better
    Estimation of the KL Divergence Between Language Models"), and no response has a negative value.

    Without `reference`, the reference is what `policy.share_base` has prepared.

    Prompts and responses are N rows of token ids; no response is empty. Equal prompts are computed once. One
    forward pass has at most `max_tokens_per_microbatch` tokens.

    Returns:
        One row per response: `policy_logp`, `reference_logp`, `kl` and `entropy` in nats, summed over its tokens.
        The entropy is the policy's, estimated in the same way.
    """
    rows, order = _by_prompt(prompts, responses, max_tokens_per_microbatch)
    reference_logits = policy.reference_logits if reference is None else reference.logits
    columns = ("policy_logp", "reference_logp", "kl", "entropy")
    parts = []
    with progress(total=len(rows), desc="KL to the reference", unit="row", mininterval=2) as bar:
        for batch in packed_batches(rows, max_tokens_per_microbatch, policy.device):
            sums = torch.zeros(batch.completions, len(columns), dtype=torch.float64)
            start = 0
            for ours, theirs in zip(policy.logits(batch), reference_logits(batch), strict=True):
                part = slice(start, start := start + len(ours))
                tokens = _compare(ours.log_softmax(1), theirs.log_softmax(1), batch.targets[part])
                sums.index_add_(0, batch.completion_index[part].cpu(), tokens.double().cpu())
            parts.append(sums)
            bar.update(len(batch.ids))
    return pd.DataFrame(torch.cat(parts).numpy(), columns=columns, index=order).sort_index()


def _compare(policy: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    """Return both log-probs, KL and entropy [n, 4] from the log-probs [n, vocabulary] of n tokens."""
    chosen = [logps.gather(1, targets[:, None])[:, 0] for logps in (policy, reference)]
    weights = policy.exp()
    kl = torch.einsum("nv,nv->n", weights, policy - reference).clamp_min(0)  # rounding can give negative values
    entropy = -torch.einsum("nv,nv->n", weights, policy)
    return torch.stack([*chosen, kl, entropy], 1)


def _by_prompt(prompts: Rows, responses: Rows, max_tokens: int) -> tuple[list[TokenRow], np.ndarray]:
    """Return rows of one prompt with its responses, within the token budget, and the responses' order in them."""
    open_groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    groups: list[list[int]] = []
    for index, prompt in enumerate(map(tuple, prompts)):
        group = open_groups[prompt]
        if group and len(prompt) + sum(len(responses[i]) for i in [*group, index]) > max_tokens:
            groups.append(group)
            group = open_groups[prompt] = []
        group.append(index)
    groups += open_groups.values()
    rows = [
        TokenRow(str(group[0]), tuple(prompts[group[0]]), tuple(tuple(responses[i]) for i in group))
        for group in groups
    ]
    return rows, np.concatenate(groups)
