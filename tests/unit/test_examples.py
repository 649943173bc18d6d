"""The parameter files in `examples/` are complete and can be planned."""

import re
from pathlib import Path

import pytest

from dpo.config import load_params

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_a_whole_parameter_file(path):
    params = load_params(path)
    assert path.read_text().startswith("# ")
    assert params.trials()
    is_adapter = params.model.adapter == "continue"
    assert (params.dpo.lora is None) == (is_adapter or path.stem == "full-1b-24gb")


def test_the_examples_cover_the_cases_of_their_list():
    listed = re.findall(r"^\| \[(\S+)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == [path.name for path in FILES]
    by_name = {path.stem: load_params(path) for path in FILES}
    assert by_name["instruct-lora-24gb"].sft is None
    assert by_name["nf4-70b-80gb"].engine.quantization == "nf4"
    assert by_name["full-1b-24gb"].dpo.optimizer == "adamw_8bit"
    assert by_name["separate-sft-data"].demonstrations.origin == "data/own/demonstrations.jsonl"
    assert by_name["continued-adapter"].model.adapter == "continue"
