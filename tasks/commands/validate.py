"""Validate data files without running the pipeline."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import groupby, islice
from pathlib import Path

import pyarrow.parquet as pq

from dpo.common.errors import InputError
from dpo.common.files import write_json
from dpo.config import Params
from dpo.data.ingest import write_raw_pairs
from dpo.data.readers import read_files
from dpo.engine.settings import ModelSettings
from tasks.common.paths import BASE
from tasks.validate import raise_errors, validate_and_report


def check_files(params: Params, files: list[str], model: Path | None, output: Path, show: int = 0) -> None:
    """Check data files; write report, metrics, quarantine and accepted pairs to a folder.

    `output/metrics.json` has a list `errors` of {code, message}, which is empty if the data can be used.
    If `model` is None, the tokenizer of the base model is used, if it exists. With a tokenizer, the first `show`
    training pairs are printed as the model reads them.

    Raises:
        InputError: a file is unreadable, the model is missing or its template needs a setting, or the data must
            not be used.
    """
    if model is not None and not model.is_dir():
        raise InputError(f"--model: {model} is not a folder; name one that contains the model's tokenizer")
    tokenizer = model or (BASE if BASE.is_dir() else None)
    if tokenizer is None:
        print(f"no tokenizer in {BASE}: lengths are in characters; set one with --model", file=sys.stderr)
        if show:
            raise InputError("--show: pairs are shown as tokens; set --model to a folder with a tokenizer")
    raw_pairs, metrics = output / "raw_pairs.parquet", output / "metrics.json"
    metrics.unlink(missing_ok=True)
    try:
        write_raw_pairs(read_files(files), raw_pairs, ", ".join(files), params.data)
    except InputError as error:
        write_json(metrics, {"errors": [{"code": "unreadable", "message": str(error)}]})
        raise
    outputs = {name: output / f"{name}.parquet" for name in ("train", "eval", "quarantine")}
    outputs |= {"report": output / "report.html", "metrics": metrics}
    origin = ", ".join(files)
    caps: dict[str, int | None] = {"train": None, "eval": None}
    with nullcontext(tokenizer) if model is None else fixed_tokenizer(model, params.model) as folder:
        result = validate_and_report(params, raw_pairs, origin, folder, caps, outputs)
        if show and folder is not None and not result.errors:
            for text in training_sequences(outputs["train"], folder, show, params.engine.max_length):
                print(text)
    raise_errors(result)


@contextmanager
def fixed_tokenizer(model: Path, settings: ModelSettings) -> Iterator[Path]:
    """Yield a folder with the tokenizer of a model, whose chat template is fixed as in stage `fetch_model`."""
    from dpo.engine.chat import fix_template
    from dpo.engine.pretrained import load_tokenizer

    tokenizer = load_tokenizer(model)
    given = tokenizer.chat_template
    try:
        merges = settings.system_in_user_turn
        fix_template(tokenizer, settings.template_kwargs, settings.date, system_in_user_turn=merges)
    except InputError as error:
        raise InputError(f"--model: {model}: {error}") from error
    if tokenizer.chat_template == given:
        yield model
        return
    with tempfile.TemporaryDirectory() as fixed:
        tokenizer.save_pretrained(fixed)
        yield Path(fixed)


def training_sequences(table: Path, model: Path, count: int, max_length: int) -> Iterator[str]:
    """Yield the first pairs of a table as decoded tokens, with prompt, completions, context and end marked."""
    from dpo.engine.chat import completion_fields
    from dpo.engine.pretrained import load_tokenizer
    from dpo.engine.tokenization import encode_pairs

    tokenizer = load_tokenizer(model)
    batches = pq.ParquetFile(table).iter_batches(batch_size=count)  # the table can be larger than memory
    pairs = list(islice((pair for batch in batches for pair in batch.to_pylist()), count))
    for pair, row in zip(pairs, encode_pairs(pairs, tokenizer, max_length), strict=True):
        lines = [f"\npair {row.id}", f"[prompt] {tokenizer.decode(row.prompt)}"]
        for number, (name, ids) in enumerate(zip(completion_fields(pair), row.completions, strict=True)):
            context = set(row.context[number]) if row.context else set()
            for is_context, places in groupby(range(len(ids) - 1), context.__contains__):
                text = tokenizer.decode([ids[place] for place in places])
                lines.append(f"[{'context' if is_context else name}] {text}")
            lines.append(f"[end] {tokenizer.decode(ids[-1:])}")
        yield "\n".join(lines)
