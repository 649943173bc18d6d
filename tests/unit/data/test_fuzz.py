"""Random input to readers gives a result or `InputError` in reasonable time."""

import gzip
import io
import json
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.data.formats import Spelling, convert, detect
from dpo.data.layouts import LAYOUTS
from dpo.data.readers import read_files
from dpo.data.turns import RowError
from dpo.engine.chat import render_pairs
from dpo.engine.tokenization import encode_pairs
from tasks.commands.lineage import of_folder
from tests.support.examples import examples
from tests.support.models import chat_tokenizer, plain_tokenizer

ROOT = Path(__file__).parents[3]
PARAMS = (ROOT / "params.yaml").read_text()
FIELDS = [
    *(
        "prompt",
        "instruction",
        "chosen",
        "rejected",
        "completions",
        "responses",
        "scores",
        "ranks",
        "role",
        "content",
    ),
    *("score", "id", "split", "source", "weight", "agreement", "chosen_rating", "label", "timestamp"),
]
TEXT = st.text(st.characters(), max_size=30) | st.sampled_from(
    ["user", "assistant", "\n\nHuman: a\n\nAssistant: b", "train", "", "\ud800", "\x00", "<|im_end|>", "{{ 7*7 }}"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | TEXT, inner, max_size=4),
    max_leaves=12,
)
ROWS = st.dictionaries(st.sampled_from(FIELDS) | TEXT, VALUES, max_size=8)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT}), max_size=4
)
LIKELY = st.fixed_dictionaries(
    {"prompt": TEXT | TURNS, "chosen": TEXT | TURNS, "rejected": TEXT | TURNS},
    optional={"split": TEXT, "id": LEAVES},
)
fuzz = settings(
    examples(60),
    deadline=5000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@contextmanager
def result_or_error(*words):
    """Accept InputError and RowError whose message contains all words."""
    try:
        yield
    except (InputError, RowError) as error:
        if not str(error) or not all(word in str(error) for word in words):
            raise


def packed(content, kind):
    """Return content as a file of this type. Bytes are returned unchanged."""
    if kind.endswith(".gz"):
        return gzip.compress(packed(content, kind.removesuffix(".gz")))
    if kind != ".parquet" or isinstance(content, bytes):
        return content if isinstance(content, bytes) else "\n".join(map(json.dumps, content)).encode()
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(content), sink)
    return sink.getvalue()


@fuzz
@given(content=st.binary(max_size=300) | st.lists(ROWS | LIKELY, max_size=4), cut=st.integers(0, 40))
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".parquet.gz"])
def test_any_file_gives_rows_and_pairs_or_an_input_error(tmp_path, kind, content, cut):
    path = tmp_path / f"a{kind}"
    try:
        complete = packed(content, kind)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError):
        complete = b"PAR1"
    path.write_bytes(complete[: len(complete) - cut] if cut < 10 else complete)
    with result_or_error(str(path)):
        rows = [raw.row for raw in read_files([str(path)]) if raw.row is not None]
        layout = detect(rows, str(path), Spelling())
        for row in rows:
            with result_or_error():
                check(convert(row, Spelling(pairing="best_rest"), layout).pairs)


def check(pairs):
    assert all(isinstance(pair[field], str) for pair in pairs for field in ("id", "prompt", "chosen", "rejected"))


@fuzz
@given(row=ROWS | LIKELY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_row_gives_pairs_or_a_row_error(row, layout):
    with result_or_error():
        check(convert(row, Spelling(pairing="best_rest"), layout).pairs)


@fuzz
@given(
    pair=st.fixed_dictionaries(
        {"id": st.just("1"), "prompt": TEXT, "chosen": TEXT, "rejected": TEXT, "turns": TURNS}
    )
)
@pytest.mark.parametrize("tokenizer", [chat_tokenizer(), plain_tokenizer()], ids=["chat", "plain"])
def test_any_pair_is_encoded_or_named(tokenizer, pair):
    pair |= {field: pair[field].encode(errors="replace").decode() for field in ("prompt", "chosen", "rejected")}
    for turn in pair["turns"]:
        turn["content"] = turn["content"].encode(errors="replace").decode()
    with result_or_error("pair 1"):
        encode_pairs([pair | {"turns": pair["turns"] or None}], tokenizer, 64)


TEMPLATES = st.lists(
    st.sampled_from(
        [
            "{{ messages }}", "{{ messages[0].content }}", "{% for m in messages %}", "{% endfor %}", "{{ m",
            "{% if add_generation_prompt %}", "{% endif %}", "{{ 1 / 0 }}", "{{ x.y.z }}", "{% raw %}",
            "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "{% for i in range(10**9) %}",
            "{{ 'a' * 10**4 }}", "{% set x = messages + 1 %}", "{% include 'x' %}", "{{ messages | tojson }}",
            "{{ messages[9].content }}", "{{ strftime_now(1) }}", "{% generation %}", "{{ messages | sum }}",
        ]
    )
    | st.text(max_size=10),
    max_size=4,
).map("".join)  # fmt: skip


@fuzz
@given(template=TEMPLATES)
def test_any_chat_template_renders_or_raises_input_error(template):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    with result_or_error("chat template fails", "chat_template.jinja"):
        render_pairs(tokenizer, [{"prompt": "Film 3?", "chosen": "A joy.", "rejected": "A bore."}])


@fuzz
@given(content=st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_provenance_file_is_read_or_named(tmp_path, content):
    (tmp_path / "provenance.json").write_bytes(content)
    with result_or_error(str(tmp_path)):
        assert isinstance(of_folder(tmp_path), dict)


def written(folder, text):
    path = folder / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    return path


def load(folder, text):
    path = written(folder, text)
    with result_or_error(str(path)):
        load_params(path)


@fuzz
@given(text=st.binary(max_size=200) | TEXT | VALUES.map(json.dumps))
def test_any_params_file_is_read_or_named(tmp_path, text):
    load(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [*x]",
        "a: &x {b: *x}",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "[" * 1500,
        f"a: {'9' * 6000}",
        b"\xff\xfe",
        b"\x00",
        "!!python/object/apply:os.system [exit]",
    ],
)
def test_invalid_yaml_is_named(tmp_path, text):
    with pytest.raises(InputError, match=r"params\.yaml: "):
        load_params(written(tmp_path, text))


KEYS = [(g, k) for g, values in YAML(typ="safe").load(PARAMS).items() if isinstance(values, dict) for k in values]


@fuzz
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_any_value_of_a_setting_is_read_or_named(tmp_path, key, value):
    params = YAML(typ="safe").load(PARAMS)
    params[key[0]][key[1]] = value
    load(tmp_path, json.dumps(params))


@fuzz
@given(start=st.integers(0, len(PARAMS)), length=st.integers(0, 30), instead=TEXT)
def test_edited_params_are_read_or_named(tmp_path, start, length, instead):
    load(tmp_path, PARAMS[:start] + instead + PARAMS[start + length :])
