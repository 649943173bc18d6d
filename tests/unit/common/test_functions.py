"""Functions of the user: one error before any work, and a hash of all code that they use."""

import importlib
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpo.common.errors import InputError
from dpo.common.functions import JUDGE, LOSS

NUMBERS = itertools.count()
FINE = "def loss(pairs, beta):\n    return beta\n"


@pytest.fixture
def own_loss(tmp_path, monkeypatch):
    """Return a function that writes files below functions/losses of a project, and names the loss in the first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(code, attribute="loss", **others):
        module = f"mine_{next(NUMBERS)}"
        folder = tmp_path / "functions/losses"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{module}.py").write_text(code)
        for name, text in others.items():
            (folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return f"functions.losses.{module}:{attribute}"

    return write


def fault(name, kind=LOSS):
    with pytest.raises(InputError) as error:
        kind.check(name, "params.yaml: KEY")
    message = str(error.value)
    assert message.startswith(f"params.yaml: KEY: '{name}' ")
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    "code",
    [
        FINE,
        "def loss(pairs, beta, scale=2): ...",
        "def loss(*values): ...",
        "loss = lambda pairs, beta: beta",
        "class Loss:\n    def __call__(self, pairs, beta): ...\nloss = Loss()",
        "import functools\nloss = functools.partial(lambda scale, pairs, beta: beta, 2)",
        "import dpo.training.losses\nfrom dpo.training.losses import PairBatch\n" + FINE,
    ],
)
def test_a_function_with_two_parameters_is_a_loss(own_loss, code):
    LOSS.check(own_loss(code), "params.yaml: KEY")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def other(pairs, beta): ...", "cannot be imported: AttributeError: .*has no attribute 'loss'"),
        ("def loss(pairs): ...", r"cannot be called as loss\(pairs, beta\): too many positional arguments"),
        ("def loss(pairs, beta, scale): ...", "cannot be called .*missing a required argument: 'scale'"),
        ("loss = 3", "cannot be called .*not a callable"),
        ("def loss(pairs, beta)", "cannot be imported: SyntaxError: expected ':'"),
        ("import absent_package", "cannot be imported: ModuleNotFoundError: No module named 'absent_package'"),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
        ("raise RuntimeError('two\\nlines')", "cannot be imported: RuntimeError: two lines"),
    ],
)
def test_another_function_is_one_error_with_the_signature_and_the_fix(own_loss, code, words):
    message = fault(own_loss(code))
    assert re.search(words, message)
    assert message.endswith(
        "; write it as module:function, for example 'functions.losses.mine:mine' for a function mine(pairs, beta) "
        "in functions/losses/mine.py"
    )


@pytest.mark.parametrize(
    "name",
    ["", ":", "loss", "functions.losses:loss", "math:sqrt", "functions/losses/mine.py:loss", "mine:loss",
     "functions.losses..a:b", "functions.judges.brevity:brevity", "dpo.training.losses.base:log_sigmoid"],
)  # fmt: skip
def test_a_function_elsewhere_is_refused(own_loss, name):
    own_loss(FINE)
    Path("mine.py").write_text(FINE)
    assert "cannot be imported: it is not in functions/losses/;" in fault(name)


@pytest.mark.parametrize(
    "code",
    [
        "import helper\n",
        "from helper import x\n",
        "from functions.judges import helper\n",
        "import functions.judges.helper as x\n",
        "from ..judges import helper\n",
        "from ..judges.helper import x\n",
        "from .inside import y\n",
        "def loss(pairs, beta):\n    import helper\n",
    ],
)
def test_code_that_dvc_does_not_track_for_this_function_is_named(own_loss, tmp_path, code):
    name = own_loss(code + FINE, inside="import helper\ny = 1\n")
    (tmp_path / "helper.py").write_text("x = 1\n")
    (tmp_path / "functions/judges").mkdir()
    (tmp_path / "functions/judges/helper.py").write_text("x = 1\n")
    assert re.search(r"imports (functions/judges/)?helper\.py, which DVC does not track", fault(name))


def test_modules_of_the_same_folder_may_be_imported(own_loss):
    code = "from .near import x\nfrom functions.losses import beside\nimport json, functions.losses.beside\n"
    LOSS.check(own_loss(code + FINE, near="x = 1\n", beside="from .near import x\n"), "params.yaml: KEY")


def test_the_hash_is_that_of_all_files_in_the_folder(own_loss, tmp_path):
    name = own_loss(FINE, near="x = 1\n")
    folder = tmp_path / "functions/losses"
    seen = [LOSS.digest(name)]
    for path, text in (
        (folder / f"{name[17:-5]}.py", FINE.replace("return beta", "return 2 * beta")),
        (folder / "near.py", "x = 2\n"),
        (folder / "words.txt", "good\n"),
    ):
        path.write_text(text)
        seen.append(LOSS.digest(name))
    assert len(set(seen)) == 4
    LOSS.check(name, "KEY")  # writes __pycache__
    (tmp_path / "other.py").write_text("")
    assert LOSS.digest(name) == seen[-1]


def test_judges_of_the_package_are_found_without_importing_it():
    for name in ("vader_compound", "ridge_rating"):
        code = (
            "import sys; from dpo.common.functions import JUDGE; "
            f"JUDGE.check('dpo.evaluation.judges.scorer:{name}', ''); assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)
    message = fault("dpo.evaluation.judges.scorer:vader", JUDGE)
    assert "scorer.py has no 'vader'; write it as module:function" in message
    JUDGE.check("functions.judges.brevity:brevity", "KEY")
    assert JUDGE.load("functions.judges.brevity:brevity", "KEY")([], ["a b", ""]) == [-2.0, 0.0]
