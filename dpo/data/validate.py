"""Validation of a raw table: write training and held-out pairs, and quarantine every other row with the reason.

The table is read twice, one row group at a time, so that memory does not grow with the texts: first to check and
compare the rows (in one process per core), then to write them. Every row is either accepted or quarantined.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, compress, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dpo.common.errors import InputError
from dpo.common.files import atomic_write
from dpo.common.progress import progress
from dpo.data.checks import Violation, check_lengths, check_texts, has_role_mark, render, special_tokens
from dpo.data.contamination import benchmark_runs, contaminated
from dpo.data.duplicates import PERMUTATIONS, Fingerprints, Sketches, compare, concatenate, fingerprint, leaks
from dpo.data.formats import COMPLETIONS, PAIR_TEXTS
from dpo.data.ingest import is_labelled, read_file_summaries
from dpo.data.rules import RULES
from dpo.data.schema import KINDS, PAIRS_SCHEMA, RAW_PAIRS_SCHEMA, Fields, validate_schema
from dpo.data.settings import ValidateSettings
from dpo.data.summary import Summary, summarize
from dpo.engine.chat import completion_fields, end_tokens
from dpo.engine.tokenization import token_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SERIAL_GROUPS = 8
"""Up to this number of row groups, one process is faster than starting others."""
SAMPLED_PROMPTS = 20_000
EXAMPLES = 5
"""Number of rows per broken rule in the report."""

Examples = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class DataError:
    """A reason why the data must not be used, with the empty split or the broken rule."""

    code: Literal["empty_split", "too_many_quarantined", "rule_broken"]
    message: str
    split: str | None = None
    rule: str | None = None


@dataclass(frozen=True)
class Validated:
    """Result of the validation of a raw table."""

    metrics: dict[str, Any]
    """Counts, rules, lengths, balance and drift, as in JSON."""
    summary: Summary
    """Statistics of the accepted pairs."""
    examples: Examples
    """Some rows for each broken rule, with file, line, texts and reason."""
    errors: list[DataError]
    """Reasons why the data must not be used. If empty, the data can be used."""
    held_out: Fingerprints
    """Of the accepted rows of the eval split."""

    def to_json(self) -> dict[str, Any]:
        """Return the metrics and the errors as JSON values."""
        errors = [{k: v for k, v in dataclasses.asdict(e).items() if v is not None} for e in self.errors]
        return {**self.metrics, "errors": errors}


class CheckedRows(NamedTuple):
    """Result of the row checks of one or more row groups."""

    violations: list[Violation]
    prints: Fingerprints
    """Of the R rows that were not excluded."""
    sketches: Sketches
    """Of the texts of these rows [R, 3, PERMUTATIONS]."""
    lengths: NDArray[np.int32]
    """Number of tokens, or of characters without a tokenizer, of their prompt, chosen and rejected [R, 3]."""
    sources: list[str]
    """Their sources [R]."""
    prompts: dict[int, str]
    """A sample of their prompts by hash: those with the smallest hashes."""
    role_marks: int
    """Number of rows with a role mark at the end of the prompt or at the start of both completions."""
    longest: int
    """Tokens of the longest completion of any row."""


def validate(
    raw_pairs: Path,
    params: ValidateSettings,
    *,
    tokenizer: Path | None,
    max_length: int,
    benchmarks: Path,
    caps: Mapping[str, int | None],
    seed: int,
    origin: str,
    previous: Mapping[str, Any] | None,
    outputs: Mapping[str, Path],
    tested: Fingerprints | None = None,
) -> Validated:
    """Check a raw table against all rules, and write the accepted and the quarantined rows.

    With `tested`, the rows are demonstrations, which have one completion. They have no statistics.

    Args:
        raw_pairs: from `write_raw_pairs`.
        params: thresholds and the action of each rule.
        tokenizer: folder of the tokenizer. None skips checks of tokens; lengths are then in characters.
        max_length: maximum number of tokens of a prompt with one completion.
        benchmarks: folder with texts that no pair may contain. Without files, the rule is not checked.
        caps: maximum number of pairs to write for `train` and `eval`, drawn at random. None writes all.
        seed: seed of that draw.
        origin: the source of the data.
        previous: `profile` of an earlier version, to measure drift if it has the same origin.
        outputs: paths of `quarantine`, `train` and `eval`. The last two are written only if there are no errors.
        tested: held-out pairs, whose prompts and completions no demonstration may have.

    Raises:
        InputError: the raw table is unreadable or violates its schema, or the tokenizer cannot encode a pair.
    """
    actions = params.actions
    excluding = frozenset(rule for rule, action in actions.items() if action != "warn")
    try:
        kind = "pairs" if tested is None else "demonstrations"
        kind = "labelled" if tested is None and is_labelled(raw_pairs) else kind
        checked, rows = _check_all(raw_pairs, tokenizer, max_length, benchmarks, excluding, kind)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{raw_pairs}: not a raw table: {error}; run the stage `ingest`") from error
    read = functools.partial(_read_texts, raw_pairs)
    similarity = params.near_duplicate_similarity
    violations = checked.violations + list(compare(checked.prints, checked.sketches, similarity, excluding, read))
    if tested is not None:
        elsewhere = dataclasses.replace(tested, row=np.full(len(tested), -1))
        leaked = leaks(concatenate([elsewhere, checked.prints]), read)
        violations += set(leaked) - set(violations)
    order = list(RULES)
    violations.sort(key=lambda violation: (violation.row, order.index(violation.rule)))
    excluded = {v.row: v for v in reversed(violations) if v.rule in excluding}
    unit = "characters" if tokenizer is None else "tokens"
    accepted = ~np.isin(checked.prints.row, list(excluded))
    prints, lengths = checked.prints.select(accepted), checked.lengths[accepted]
    sources = list(compress(checked.sources, accepted))
    prompts = [prompt for _, prompt in sorted(checked.prompts.items())]
    earlier = previous if previous and previous.get("origin") == origin else None
    summary = Summary()
    if kind != "demonstrations":
        summary = summarize(lengths, prints.held_out, sources, prompts, unit, params, earlier)
    summary.profile["origin"] = origin
    if checked.role_marks > len(checked.prints) / 2:
        reason = f"{checked.role_marks} of {len(checked.prints)} pairs have a mark such as `Assistant:`"
        summary.notices.append(("role_marks", reason))
    assert rows == len(prints) + len(excluded)
    counts = Counter([*(violation.rule for violation in violations), *(rule for rule, _ in summary.notices)])
    sizes = {"rows": rows, "accepted": len(prints), "quarantined": len(excluded)}
    files = {name: vars(file) for name, file in read_file_summaries(raw_pairs).items()}
    rules = {rule: counts[rule] for rule in RULES}
    metrics = {**summary.metrics, "kind": kind, **sizes, "unit": unit, "rules": rules, "files": files}
    used = {}
    for split, cap in caps.items():
        pairs = pd.Series(prints.row[prints.held_out == (split == "eval")])
        used[split] = (pairs if cap is None else pairs.sample(min(cap, len(pairs)), random_state=seed)).to_numpy()
        metrics[split] = {"pairs": len(pairs), "used": len(used[split])}
    broken = [rule for rule, action in actions.items() if action == "error" and counts[rule]]
    errors = _shortages(metrics, params.max_quarantined)
    shown = [v for rule in RULES for v in islice((v for v in violations if v.rule == rule), EXAMPLES)]
    examples = _write(
        raw_pairs, outputs, excluded, shown, {} if broken or errors else used, metrics, KINDS[kind][1]
    )
    fixes = {"completion_too_long": f"engine.max_length: {checked.longest + 1} takes all completions"}
    errors = [
        _rule_error(rule, metrics["rules"][rule], examples, summary.notices, fixes.get(rule)) for rule in broken
    ] + errors
    return Validated(metrics, summary, examples, errors, prints.select(prints.held_out))


def _check_all(
    raw_pairs: Path,
    tokenizer: Path | None,
    max_length: int,
    benchmarks: Path,
    excluding: frozenset[str],
    kind: str,
) -> tuple[CheckedRows, int]:
    """Check all row groups; return the result and the number of rows."""
    file = pq.ParquetFile(raw_pairs)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    if not sum(sizes):
        raise InputError(f"{raw_pairs}: no rows; run the stage `ingest`")
    starts = np.cumsum([0, *sizes])[:-1].tolist()
    check = functools.partial(_check_group, raw_pairs, tokenizer, max_length, benchmarks, excluding, kind)
    parts, prompts, names, count = [], dict[int, str](), dict[str, str](), 0
    sketches = np.empty((sum(sizes), 3, PERMUTATIONS), np.uint16)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        run: Any = pool.map if len(sizes) > MAX_SERIAL_GROUPS else map  # an unused pool starts no process
        groups = run(check, range(len(sizes)), starts)
        for part in progress(groups, total=len(sizes), desc="checking", unit="group", mininterval=2):
            sketches[count : count + len(part.prints)] = part.sketches
            count += len(part.prints)
            sources = [names.setdefault(name, name) for name in part.sources]  # each name is held once
            parts.append(part._replace(prompts={}, sketches=sketches[:0], sources=sources))
            prompts = dict(sorted((prompts | part.prompts).items())[:SAMPLED_PROMPTS])
    violations, prints, _, lengths, named, _, marks, longest = zip(*parts, strict=True)
    merged = list(chain(*violations)), concatenate(prints), sketches[:count], np.concatenate(lengths)
    return CheckedRows(*merged, list(chain(*named)), prompts, sum(marks), max(longest)), sum(sizes)


@functools.cache
def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if multiprocessing.parent_process() is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process per core
    from dpo.engine.pretrained import load_tokenizer

    return load_tokenizer(folder)


def _check_group(
    raw_pairs: Path,
    folder: Path | None,
    max_length: int,
    benchmarks: Path,
    excluding: frozenset[str],
    kind: str,
    group: int,
    start: int,
) -> CheckedRows:
    """Check the rules of single rows for the row group that begins at row `start`."""
    tokenizer = None if folder is None else _load_tokenizer(folder)
    table = pq.ParquetFile(raw_pairs).read_row_group(group)
    validate_schema(
        KINDS[kind][0], table.to_pandas().set_index(np.arange(start, start + len(table))), str(raw_pairs)
    )
    special = special_tokens(tokenizer)
    ends = () if tokenizer is None else end_tokens(tokenizer)
    broken: dict[int, list[tuple[str, str]]] = {}
    records = table.drop_columns(["original", "file", "line"]).to_pylist()
    for row, pair in enumerate(records, start):
        broken[row] = [(pair["rule"], pair["reason"])] if pair["rule"] else check_texts(pair, special, ends)
    rows = [row for row, rules in broken.items() if excluding.isdisjoint(rule for rule, _ in rules)]
    pairs = [records[row - start] for row in rows]
    if runs := benchmark_runs(benchmarks):
        for row, words in zip(rows, contaminated(pairs, runs), strict=True):
            broken[row] += [("contaminated", f"a text of {benchmarks} is in the pair: {words!r}")] if words else []
    longest = 0
    if tokenizer is None:
        lengths = np.array([[len(pair[text] or "") for text in PAIR_TEXTS] for pair in pairs], np.int32).reshape(
            -1, 3
        )
    else:
        texts, changed = render(tokenizer, pairs)
        for row, rules in zip(rows, changed, strict=True):
            broken[row] += rules
        readable = [text is not None for text in texts]
        rows, pairs = list(compress(rows, readable)), list(compress(pairs, readable))
        rendered = [text for text in texts if text is not None]
        try:
            tokens = []
            for pair, encoded in zip(pairs, token_rows(tokenizer, pairs, rendered), strict=True):
                sides = dict(zip(completion_fields(pair), encoded.completions, strict=True))
                tokens.append((encoded.prompt, *(sides.get(field, ()) for field in COMPLETIONS)))
        except ValueError as error:
            where = f"{raw_pairs}: rows {start + 1} to {start + len(table)}"
            raise InputError(f"{where}: the tokenizer in {folder} cannot encode a pair: {error}") from error
        lengths = np.array([list(map(len, parts)) for parts in tokens], np.int32).reshape(-1, 3)
        longest = int(lengths[:, 1:].max(initial=0))
        for row, pair, sizes in zip(rows, pairs, lengths.tolist(), strict=True):
            broken[row] += check_lengths(sizes, max_length, pair["turns"])
        fits = np.array([excluding.isdisjoint(rule for rule, _ in broken[row]) for row in rows], bool)
        rows, pairs, lengths = list(compress(rows, fits)), list(compress(pairs, fits)), lengths[fits]
    prints, sketches = fingerprint(pairs, rows)
    prompts = dict(zip(prints.texts[:, 0].tolist(), (pair["prompt"] for pair in pairs), strict=True))
    return CheckedRows(
        [Violation(row, *rule) for row, rules in broken.items() for rule in dict(reversed(rules)).items()],
        prints,
        sketches,
        lengths,
        [pair["source"] for pair in pairs],
        {code: prompts[code] for code in sorted(prompts)[:SAMPLED_PROMPTS]},
        sum(map(has_role_mark, pairs)),
        longest,
    )


def _read_texts(raw_pairs: Path, rows: set[int]) -> dict[int, list[str]]:
    """Return prompt, chosen and rejected of rows of a raw table, by their positions."""
    file, start, texts = pq.ParquetFile(raw_pairs), 0, dict[int, list[str]]()
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        if mine := sorted(rows.intersection(range(start, end))):
            columns = file.read_row_group(group, columns=list(PAIR_TEXTS)).take([row - start for row in mine])
            parts = zip(*(columns[name].to_pylist() for name in PAIR_TEXTS), strict=True)
            texts |= {row: [text or "" for text in part] for row, part in zip(mine, parts, strict=True)}
        start = end
    return texts


def _shortages(metrics: Mapping[str, Any], max_quarantined: float) -> list[DataError]:
    """Return errors if too many rows are quarantined or a split has no pairs."""
    errors: list[DataError] = []
    if (share := metrics["quarantined"] / metrics["rows"]) > max_quarantined:
        message = f"{share:.1%} of the rows are quarantined, the maximum is {max_quarantined:.1%}"
        fix = "fix the rows, or raise validate.max_quarantined"
        errors.append(DataError("too_many_quarantined", f"{message}; {fix}"))
        if not metrics["accepted"]:
            return errors  # that the splits are empty follows from it
    for split in (split for split in ("train", "eval") if split in metrics):
        if not metrics[split]["pairs"]:
            message = f"split '{split}' has no valid pairs; add prompts, or a `split` column with both values"
            errors.append(DataError("empty_split", message, split=split))
    return errors


def _rule_error(
    rule: str, count: int, examples: Examples, notices: list[tuple[str, str]], fix: str | None
) -> DataError:
    """Return the error for a rule whose action is `error`: the first violation and the fix."""
    rows = (f"{row['file']}, line {row['line']}: {row['reason']}" for row in examples.get(rule, []))
    first = next(chain(rows, (reason for name, reason in notices if name == rule)))
    message = f"{first}; {fix or RULES[rule].fix} (rule '{rule}', {count} in total)"
    return DataError("rule_broken", message, rule=rule)


def _write(
    raw_pairs: Path,
    outputs: Mapping[str, Path],
    excluded: Mapping[int, Violation],
    shown: list[Violation],
    used: Mapping[str, NDArray[np.int64]],
    metrics: dict[str, Any],
    schema_of_used: type[Fields],
) -> Examples:
    """Write the quarantine and the used pairs of each split; add `human_ceiling` to the metrics."""
    file = pq.ParquetFile(raw_pairs)
    examples: Examples = {}
    agreement: dict[str, list[float]] = {split: [] for split in used}
    masks = {split: np.isin(np.arange(file.metadata.num_rows), rows) for split, rows in used.items()}
    with ExitStack() as stack:
        writers = {}
        for name, schema in {"quarantine": RAW_PAIRS_SCHEMA, **dict.fromkeys(used, PAIRS_SCHEMA)}.items():
            tmp = stack.enter_context(atomic_write(outputs[name]))
            writers[name] = stack.enter_context(pq.ParquetWriter(tmp, schema, compression="zstd"))
        start = 0
        for group in progress(range(file.num_row_groups), desc="writing", unit="group", mininterval=2):
            table = file.read_row_group(group)
            writers["quarantine"].write_table(_quarantine(table, start, excluded))
            for row, rule, reason in shown:
                if start <= row < start + len(table):
                    (record,) = table.slice(row - start, 1).to_pylist()
                    examples.setdefault(rule, []).append({**record, "rule": rule, "reason": reason})
            for split, mask in masks.items():
                part = table.filter(mask[start : start + len(table)]).select(PAIRS_SCHEMA.names)
                if len(part):
                    pairs = validate_schema(schema_of_used, part.to_pandas(), str(raw_pairs))
                    agreement[split] += pairs["agreement"].dropna().tolist()
                    writers[split].write_table(part)
            start += len(table)
    for split, values in agreement.items():
        metrics[split]["human_ceiling"] = sum(values) / len(values) if values else None
    return examples


def _quarantine(table: pa.Table, start: int, excluded: Mapping[int, Violation]) -> pa.Table:
    """Return the excluded rows of a row group that begins at row `start`, with rule and reason."""
    rows = [row for row in range(start, start + len(table)) if row in excluded]
    part = table.take(pa.array([row - start for row in rows], pa.int64()))
    for column in ("rule", "reason"):
        texts = pa.array([getattr(excluded[row], column) for row in rows], pa.string())
        part = part.set_column(part.schema.get_field_index(column), column, texts)
    return part
