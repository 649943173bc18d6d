"""Errors of models that cannot be loaded."""

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from dpo.common.errors import InputError, TransientError
from dpo.engine.pretrained import load_weights


class Unreachable:
    """An Auto class whose hub is unreachable."""

    @staticmethod
    def from_pretrained(source, **options):
        raise OSError("We couldn't connect") from LocalEntryNotFoundError("no connection")


@pytest.mark.parametrize(("offline", "expected"), [(False, TransientError), (True, InputError)])
def test_an_unreachable_hub_is_a_transient_error_unless_offline_mode_is_set(monkeypatch, offline, expected):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(expected, match="cannot load 'someone/model': We couldn't connect"):
        load_weights(Unreachable, "someone/model", "main")
