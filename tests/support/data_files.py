"""Files with rows in every format, and what the readers make of them."""

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq

from dpo.data.readers import read_files
from dpo.data.settings import DataSettings


def data_params(**changes):
    defaults = {
        "source": "data/own/pairs.jsonl",
        "revision": None,
        "pairing": "best_worst",
        "max_train_pairs": None,
        "max_eval_pairs": None,
        "eval_fraction": 0.25,
        "min_rating_gap": 1.0,
    }
    return DataSettings(**{**defaults, **changes})


def texts(count=3, start=0):
    return [
        {"prompt": f"Film {i}?", "chosen": f"A joy, “{i}”;\n{i}.", "rejected": f"Bore {i}"}
        for i in range(start, start + count)
    ]


def content_of(rows, kind):
    if kind.endswith(".gz"):
        return gzip.compress(content_of(rows, kind.removesuffix(".gz")))
    if kind == ".jsonl":
        return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
    if kind == ".json":
        return json.dumps(rows, indent=1, ensure_ascii=False).encode()
    if kind == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
        return text.getvalue().encode()
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content_of(rows, "".join(path.suffixes)))
    return str(path)


def read(*names):
    return list(read_files(map(str, names)))


def rows_of(*names):
    raws = read(*names)
    assert not any(raw.violation for raw in raws)
    return [raw.row for raw in raws]


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


TURNS = [{"role": "system", "content": "Be brief."}, user("Film 3?"), answer("A joy."), user("Why, “so”?")]
FORMS = {
    "texts": texts(),
    "texts with all columns": [
        {
            **row,
            "id": str(i),
            "split": "test",
            "source": "forum",
            "timestamp": "2024-05-01",
            "weight": 0.5,
            "agreement": 0.75,
            "chosen_rating": 2.0,
            "rejected_rating": -1.0,
        }
        for i, row in enumerate(texts())
    ],
    "instruction": [{"instruction": "a", "chosen": "b", "rejected": "c"}],
    "conversational": [{"prompt": TURNS, "chosen": [answer("b")], "rejected": [answer("c")]}] * 2,
    "ultrafeedback binarized": [
        {"prompt": "a", "chosen": [user("a"), answer("b")], "rejected": [user("a"), answer("c")]}
    ],
    "implicit prompt": [{"chosen": [*TURNS, answer("b")], "rejected": [*TURNS, answer("c")]}] * 2,
    "transcripts": [
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
        }
    ],
    "ultrafeedback": [
        {
            "instruction": "a",
            "completions": [{"response": "b", "overall_score": 1.5}, {"response": "c", "overall_score": 3.0}],
        }
    ],
    "scores": [{"prompt": "a", "responses": ["b", "c", "d"], "scores": [1.5, 3.0, 0.0]}],
    "ranks": [{"prompt": "a", "responses": ["b", "c", "d"], "ranks": [2, 1, 3]}],
}
