"""The table of rules and the setting `validate.rules`."""

from pathlib import Path

import pytest

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.data.rules import DATA_RULES, ROW_RULES, RULES, TABLE_RULES
from dpo.data.settings import ValidateSettings

PARAMS = (Path(__file__).parents[3] / "params.yaml").read_text()


def load(folder, rules):
    path = folder / "params.yaml"
    path.write_text(PARAMS.replace("validate:\n", f"validate:\n  rules: {rules}\n"))
    return load_params(path).validate


def test_every_rule_has_a_meaning_a_fix_and_an_allowed_default():
    assert len(RULES) == len(ROW_RULES) + len(TABLE_RULES) + len(DATA_RULES)
    assert all(rule.meaning and rule.fix and rule.default in rule.allowed for rule in RULES.values())
    assert RULES["completion_too_long"].allowed == ("error", "quarantine")
    assert {RULES[name].allowed for name in DATA_RULES} == {("error", "warn")}


def test_validate_rules_overrides_the_defaults(tmp_path):
    assert ValidateSettings().actions == {name: rule.default for name, rule in RULES.items()}
    settings = load(tmp_path, "{mojibake: warn, drift: error}")
    assert settings.rules == {"mojibake": "warn", "drift": "error"}
    assert settings.actions == ValidateSettings().actions | settings.rules


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("{mojibak: warn}", "validate.rules.mojibak: unknown key; remove it or correct its name"),
        (
            "{mojibake: ignore}",
            "validate.rules.mojibake: input should be 'error', 'quarantine' or 'warn', got 'ignore'",
        ),
        ("{wrong_type: warn}", "validate.rules.wrong_type: input should be 'error' or 'quarantine', got 'warn'"),
        ("{drift: quarantine}", "validate.rules.drift: input should be 'error' or 'warn', got 'quarantine'"),
        (
            "{completion_too_long: warn}",
            "validate.rules.completion_too_long: input should be 'error' or 'quarantine', got 'warn'",
        ),
        ("warn", "validate.rules: input should be an object, got 'warn'"),
    ],
)
def test_unknown_rules_and_actions_that_a_rule_does_not_allow_are_rejected(tmp_path, rules, words):
    with pytest.raises(InputError) as error:
        load(tmp_path, rules)
    assert str(error.value) == f"{tmp_path / 'params.yaml'}: {words}"
