"""Validation: a candidate table in, sound training and held-out tables out, all other rows set aside, with reason.

The table is read twice, row group by row group, so memory does not grow with the texts: first to measure and
compare (in one process for each core), then to write. Rows in = rows out + rows set aside, and that is asserted.
"""

import dataclasses
import functools
import multiprocessing
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import TemplateError
from numpy.typing import NDArray
from scipy.stats import binomtest
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dpo.common.errors import InputError
from dpo.common.files import atomic_write
from dpo.data.drift import drift, profile
from dpo.data.duplicates import Marks, compare, join, mark
from dpo.data.rules import RULES, TEXTS, Finding, check_lengths, check_texts, special_tokens, token_lengths
from dpo.data.schema import PAIRS_SCHEMA, RAW_PAIRS_SCHEMA, Pairs, RawPairs, hold
from dpo.data.settings import ValidateSettings
from dpo.engine.pretrained import load_tokenizer

GROUPS_ALONE = 8
"""So few row groups are done sooner than other processes start."""
SAMPLED_PROMPTS = 20_000
EXAMPLES = 5
"""Rows of each broken rule that the report shows."""
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
FEW_PAIRS = 20
"""A source with fewer pairs says nothing about balance."""
LARGEST_SOURCES = 50
BINS = 24


@dataclass(frozen=True)
class Examined:
    """What is known of one row group, or of several."""

    findings: list[Finding]
    marks: Marks
    """Of the rows that keep the rules of single rows."""
    lengths: NDArray[np.int32]
    """Tokens, or characters without a tokenizer, of their prompt, chosen and rejected [R, 3]."""
    sources: list[str]
    prompts: dict[int, str]
    """A sample of the prompts by hash: those with the least hashes."""


@dataclass(frozen=True)
class Validated:
    """The verdict on a candidate table."""

    metrics: dict[str, Any]
    """Counts, rules, lengths, balance and drift, as JSON has them."""
    histograms: dict[str, tuple[list[float], list[int]]]
    """Edges and counts of the lengths of prompts, chosen and rejected, up to their 99th percentile."""
    profile: dict[str, Any]
    """What a later version of the data is compared with; empty if no row is sound."""
    examples: dict[str, list[dict[str, Any]]]
    """Of each broken rule some rows, with place, texts and reason."""
    notices: list[tuple[str, str]]
    """Broken rules about the data as a whole, with the reason."""
    errors: list[str]
    """Why the data must not be used; empty if it may."""


def validate(
    candidates: Path,
    params: ValidateSettings,
    *,
    tokenizer: Path | None,
    max_length: int,
    caps: Mapping[str, int | None],
    seed: int,
    previous: Mapping[str, Any] | None,
    outputs: Mapping[str, Path],
) -> Validated:
    """Hold a candidate table against the contract and write what is sound and what is not.

    Args:
        candidates: from `collect`.
        params: thresholds, and what a breach of each rule does.
        tokenizer: folder of the model's tokenizer; None leaves out what needs one, lengths are then in characters.
        max_length: most tokens of a prompt with one completion.
        caps: most pairs to write of the splits `train` and `eval`, drawn at random; None writes all.
        seed: of that draw.
        previous: `profile` of the version to compare with.
        outputs: where to write: `quarantine`, and `train` and `eval`, written only if the data may be used.

    Returns:
        The verdict; whether the data may be used is in its `errors`.

    Raises:
        InputError: the candidate table is not one.
    """
    actions = {**dataclasses.asdict(params.rules), "completion_too_long": "error"}
    barring = frozenset(rule for rule, action in actions.items() if action != "warn")
    try:
        examined, total = _examine_all(candidates, tokenizer, max_length, barring)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{candidates}: not a candidate table: {error}; run the stage `ingest`") from error
    findings = examined.findings + list(compare(examined.marks, params.near_duplicate_similarity, barring))
    order = {rule: number for number, rule in enumerate(RULES)}
    findings.sort(key=lambda finding: (finding.row, order[finding.rule]))
    barred = {f.row: f for f in reversed(findings) if f.rule in barring}

    sound = ~np.isin(examined.marks.row, list(barred))
    marks, lengths = examined.marks.where(sound), examined.lengths[sound]
    sources = [source for source, kept in zip(examined.sources, sound, strict=True) if kept]
    prompts = [prompt for _, prompt in sorted(examined.prompts.items())]
    metrics: dict[str, Any] = {"rows": total, "accepted": len(marks), "quarantined": len(barred)}
    assert metrics["rows"] == metrics["accepted"] + metrics["quarantined"]
    counts = Counter(finding.rule for finding in findings)
    metrics["rules"] = {rule: counts[rule] for rule in RULES}
    metrics["unit"] = "characters" if tokenizer is None else "tokens"
    notices = []
    profiled: dict[str, Any] = {}
    histograms = {}
    if len(marks):
        metrics["lengths"] = _quantiles(lengths)
        histograms = _histograms(lengths)
        metrics["chosen_longer"], bias = _length_bias(lengths, params.max_longer_share)
        by_source, imbalance = _balance(marks, lengths, sources, params.max_longer_share)
        metrics["sources"] = by_source
        notices = [("length_bias", reason) for reason in bias] + [("source_imbalance", r) for r in imbalance]
        shown = {name: source["pairs"] for name, source in by_source.items()}
        profiled = {"unit": metrics["unit"], **profile(lengths, shown, prompts)}
        if previous and previous.get("unit") == metrics["unit"]:
            metrics["drift"] = drift(previous, lengths, shown, prompts)
            notices += [
                (
                    "drift",
                    f"{view}: population stability index {value:.2f}, at most {params.max_drift:g} is wanted",
                )
                for view, value in metrics["drift"].items()
                if value > params.max_drift
            ]
    metrics["rules"] |= Counter(rule for rule, _ in notices)

    forbidden = [rule for rule in RULES if actions[rule] == "error" and metrics["rules"][rule]]
    errors = _shortages(metrics, params, marks)
    used = _draw(marks, caps, seed)
    metrics |= {
        split: {"pairs": int((marks.held_out == (split == "eval")).sum()), "used": len(used[split])}
        for split in ("train", "eval")
    }
    writes = {} if errors or forbidden else used
    examples = _write(candidates, outputs, barred, _examples(findings), writes, metrics)
    errors = [_breach(rule, metrics["rules"][rule], examples, notices) for rule in forbidden] + errors
    return Validated(metrics, histograms, profiled, examples, notices, errors)


def _examine_all(
    candidates: Path, tokenizer: Path | None, max_length: int, barring: frozenset[str]
) -> tuple[Examined, int]:
    file = pq.ParquetFile(candidates)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    if not sum(sizes):
        raise InputError(f"{candidates}: no rows; run the stage `ingest`")
    starts = np.cumsum([0, *sizes])[:-1].tolist()
    examine = functools.partial(_examine, candidates, tokenizer, max_length, barring)
    with ExitStack() as stack:
        run: Any = map
        if len(sizes) > GROUPS_ALONE:
            context = multiprocessing.get_context("spawn")
            run = stack.enter_context(ProcessPoolExecutor(os.cpu_count(), context)).map
        parts, prompts = [], dict[int, str]()
        groups = run(examine, range(len(sizes)), starts)
        for part in tqdm(groups, total=len(sizes), desc="checking", unit="group", mininterval=2):
            parts.append(dataclasses.replace(part, prompts={}))
            prompts = dict(sorted((prompts | part.prompts).items())[:SAMPLED_PROMPTS])
    return (
        Examined(
            [finding for part in parts for finding in part.findings],
            join([part.marks for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            [source for part in parts for source in part.sources],
            prompts,
        ),
        sum(sizes),
    )


@functools.cache
def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if multiprocessing.parent_process() is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    return load_tokenizer(folder)


def _examine(
    candidates: Path, folder: Path | None, max_length: int, barring: frozenset[str], group: int, start: int
) -> Examined:
    """The rules of single rows for the row group that starts at a row, and what is needed for all other rules."""
    tokenizer = None if folder is None else _load_tokenizer(folder)
    table = pq.ParquetFile(candidates).read_row_group(group)
    hold(RawPairs, table.to_pandas().set_index(np.arange(start, start + len(table))), str(candidates))
    special = special_tokens(tokenizer)
    end = None if tokenizer is None else tokenizer.eos_token
    found: dict[int, list[tuple[str, str]]] = {}
    records = table.drop_columns(["original", "file", "line"]).to_pylist()
    for row, pair in enumerate(records, start):
        found[row] = [(pair["rule"], pair["reason"])] if pair["rule"] else check_texts(pair, special, end)
    rows = [row for row, broken in found.items() if not any(rule in barring for rule, _ in broken)]
    pairs = [records[row - start] for row in rows]
    if tokenizer is None:
        lengths = np.array([[len(pair[field]) for field in TEXTS] for pair in pairs], np.int32).reshape(-1, 3)
    else:
        try:
            lengths = token_lengths(tokenizer, pairs)
        except (ValueError, TemplateError) as error:
            place = f"{candidates}: rows {start + 1} to {start + len(table)}"
            raise InputError(f"{place}: the tokenizer of {folder} cannot take a pair: {error}") from error
        fits = []
        for row, counted in zip(rows, lengths.tolist(), strict=True):
            broken = check_lengths(counted, max_length)
            found[row] += broken
            fits.append(not any(rule in barring for rule, _ in broken))
        rows = [row for row, fit in zip(rows, fits, strict=True) if fit]
        pairs = [pair for pair, fit in zip(pairs, fits, strict=True) if fit]
        lengths = lengths[np.array(fits, bool)]
    marks = mark(pairs, rows)
    prompts = dict(zip(marks.texts[:, 0].tolist(), (pair["prompt"] for pair in pairs), strict=True))
    return Examined(
        [Finding(row, *fault) for row, broken in found.items() for fault in broken],
        marks,
        lengths,
        [pair["source"] for pair in pairs],
        {code: prompts[code] for code in sorted(prompts)[:SAMPLED_PROMPTS]},
    )


def _quantiles(lengths: NDArray[np.int32]) -> dict[str, dict[str, float]]:
    columns = dict(zip(TEXTS, lengths.T, strict=True)) | {"pair": lengths[:, 0] + lengths[:, 1:].max(1)}
    return {
        name: {label: float(np.quantile(values, q, method="lower")) for label, q in QUANTILES.items()}
        for name, values in columns.items()
    }


def _histograms(lengths: NDArray[np.int32]) -> dict[str, tuple[list[float], list[int]]]:
    top = max(1.0, float(np.quantile(lengths, 0.99)))
    counted = {name: np.histogram(np.minimum(lengths[:, i], top), BINS, (0, top)) for i, name in enumerate(TEXTS)}
    return {name: (edges.tolist(), counts.tolist()) for name, (counts, edges) in counted.items()}


def _length_bias(lengths: NDArray[np.int32], most: float) -> tuple[dict[str, float] | None, list[str]]:
    """The share of pairs whose chosen completion is longer, of those of unequal length, with a 95% interval."""
    longer, unequal = int((lengths[:, 1] > lengths[:, 2]).sum()), int((lengths[:, 1] != lengths[:, 2]).sum())
    if not unequal:
        return None, []
    interval = binomtest(longer, unequal).proportion_ci(method="wilson")
    share = {"share": longer / unequal, "low": float(interval.low), "high": float(interval.high)}
    if share["low"] > most or share["high"] < 1 - most:
        side = "chosen" if share["share"] > 0.5 else "rejected"
        part = max(share["share"], 1 - share["share"])
        return share, [
            f"{side} is the longer one in {part:.0%} of pairs (chosen: {share['low']:.3f} to {share['high']:.3f})"
        ]
    return share, []


def _balance(
    marks: Marks, lengths: NDArray[np.int32], sources: list[str], most: float
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Pairs, held-out pairs and length bias of the largest sources, and what is out of balance."""
    table = pd.DataFrame({"source": sources, "held_out": marks.held_out})
    names = table["source"].value_counts()
    shown, faults = {}, []
    for name in names.index[:LARGEST_SOURCES]:
        own = (table["source"] == name).to_numpy()
        held_out = int(marks.held_out[own].sum())
        share, bias = _length_bias(lengths[own], most)
        shown[str(name)] = {"pairs": int(own.sum()), "eval": held_out, "chosen_longer": share and share["share"]}
        if len(names) > 1 and own.sum() >= FEW_PAIRS:
            faults += [f"source {name!r}: {fault}" for fault in bias]
            if held_out in (0, own.sum()):
                faults.append(f"source {name!r}: all of its {own.sum()} pairs are in one split")
    return shown, faults


def _breach(
    rule: str, count: int, examples: dict[str, list[dict[str, Any]]], notices: list[tuple[str, str]]
) -> str:
    """Where a rule that is set to error is first broken, how, and the mend."""
    if rule in examples:
        row = examples[rule][0]
        found = f"{row['file']}, line {row['line']}: {row['reason']}"
    else:
        found = next(reason for name, reason in notices if name == rule)
    return f"{found}; {RULES[rule].mend} (rule '{rule}', {count} in all)"


def _shortages(metrics: dict[str, Any], params: ValidateSettings, marks: Marks) -> list[str]:
    """Too many rows set aside, or no sound pair in a split."""
    errors = []
    share = metrics["quarantined"] / metrics["rows"]
    if share > params.max_quarantined:
        errors.append(
            f"{share:.1%} of the rows were set aside, at most {params.max_quarantined:.1%} may "
            "(validate.max_quarantined)"
        )
    for split, there in (("train", ~marks.held_out), ("eval", marks.held_out)):
        if not there.any():
            errors.append(
                f"no sound pair is in split '{split}'; bring more prompts or a `split` column with both values"
            )
    return errors


def _draw(marks: Marks, caps: Mapping[str, int | None], seed: int) -> dict[str, NDArray[np.int64]]:
    used = {}
    for split, cap in caps.items():
        rows = pd.Series(marks.row[marks.held_out == (split == "eval")])
        used[split] = (rows if cap is None else rows.sample(min(cap, len(rows)), random_state=seed)).to_numpy()
    return used


def _examples(findings: list[Finding]) -> dict[int, list[Finding]]:
    seen: Counter[str] = Counter()
    rows: dict[int, list[Finding]] = {}
    for finding in findings:
        seen[finding.rule] += 1
        if seen[finding.rule] <= EXAMPLES:
            rows.setdefault(finding.row, []).append(finding)
    return rows


def _write(
    candidates: Path,
    outputs: Mapping[str, Path],
    barred: dict[int, Finding],
    shown: dict[int, list[Finding]],
    used: dict[str, NDArray[np.int64]],
    metrics: dict[str, Any],
) -> dict[str, list[dict[str, Any]]]:
    """Write the quarantine and the splits that are used; complete the metrics; give examples."""
    file = pq.ParquetFile(candidates)
    examples: dict[str, list[dict[str, Any]]] = {}
    agreement: dict[str, list[float]] = {split: [] for split in used}
    masks = {split: np.isin(np.arange(file.metadata.num_rows), rows) for split, rows in used.items()}
    with ExitStack() as stack:
        writers = {}
        for name in ("quarantine", *used):
            tmp = stack.enter_context(atomic_write(outputs[name]))
            schema = RAW_PAIRS_SCHEMA if name == "quarantine" else PAIRS_SCHEMA
            writers[name] = stack.enter_context(pq.ParquetWriter(tmp, schema, compression="zstd"))
        start = 0
        for group in tqdm(range(file.num_row_groups), desc="writing", unit="group", mininterval=2):
            table = file.read_row_group(group)
            rows = range(start, start + len(table))
            start += len(table)
            aside_rows = [row for row in rows if row in barred]
            part = table.take(pa.array([row - rows.start for row in aside_rows], pa.int64()))
            for column in ("rule", "reason"):
                texts = pa.array([getattr(barred[row], column) for row in aside_rows], pa.string())
                part = part.set_column(part.schema.get_field_index(column), column, texts)
            writers["quarantine"].write_table(part)
            for row in (row for row in rows if row in shown):
                (record,) = table.slice(row - rows.start, 1).to_pylist()
                for finding in shown[row]:
                    examples.setdefault(finding.rule, []).append(
                        {**record, "rule": finding.rule, "reason": finding.reason}
                    )
            for split, wanted in masks.items():
                part = table.filter(wanted[rows.start : rows.stop]).select(PAIRS_SCHEMA.names)
                if len(part):
                    agreement[split] += (
                        hold(Pairs, part.to_pandas(), str(candidates))["agreement"].dropna().tolist()
                    )
                    writers[split].write_table(part)
    for split, values in agreement.items():
        metrics[split]["human_ceiling"] = sum(values) / len(values) if values else None
    return examples
