"""Drift: the population stability index of lengths, sources and prompts."""

import json
import math

import numpy as np
import pytest

from dpo.data.drift import CLUSTERS, drift, profile, psi
from dpo.data.formats import PAIR_TEXTS

TOPICS = ["film camera actor scene", "soup recipe salt oven", "python error list loop", "tax form date office"]
SOURCES = {"a": 600, "b": 300, "c": 100}


def lengths(seed=0, rows=2000, factors=(1, 1, 1)):
    draw = np.random.default_rng(seed)
    return (draw.lognormal(4, 0.5, size=(rows, 3)) * factors).astype(np.int32) + 1


def prompts(seed=0, topics=TOPICS, rows=2000):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(topics[draw.integers(len(topics))].split(), size=6)) for _ in range(rows)]


@pytest.fixture(scope="module")
def old():
    return profile(lengths(), SOURCES, prompts())


def changed(old, **changes):
    new = {"lengths": lengths(), "sources": SOURCES, "prompts": prompts(), **changes}
    return drift(old, **new)


def test_psi_matches_the_formula():
    assert psi([0.5, 0.5], [0.25, 0.75]) == pytest.approx(0.25 * math.log(2) + 0.25 * math.log(1.5))
    assert psi([0.2, 0.3, 0.5], [0.5, 0.3, 0.2]) == pytest.approx(2 * 0.3 * math.log(2.5))
    assert psi([0.2, 0.8], [0.6, 0.4]) == pytest.approx(psi([0.6, 0.4], [0.2, 0.8]))


def test_psi_counts_an_empty_bin_as_one_thousandth():
    assert psi([0, 1], [0.5, 0.5]) == pytest.approx(0.499 * math.log(500) + 0.5 * math.log(2))
    assert psi([0, 1], [0, 1]) == 0


def test_the_same_data_has_no_drift(old):
    views = changed(old)
    assert list(views) == [*(f"{name}_tokens" for name in PAIR_TEXTS), "sources", "prompts"]
    assert views == pytest.approx(dict.fromkeys(views, 0), abs=1e-9)


def test_a_profile_survives_json(old):
    written = json.loads(json.dumps(old, allow_nan=False))
    assert written == old
    assert changed(written) == changed(old)
    for name in PAIR_TEXTS:
        assert sum(old["lengths"][name]["shares"]) == pytest.approx(1)
    assert old["sources"] == {"a": 0.6, "b": 0.3, "c": 0.1}
    assert sum(old["prompts"]["shares"]) == pytest.approx(1)
    assert len(old["prompts"]["centres"]) == CLUSTERS


def test_profile_is_deterministic(old):
    assert profile(lengths(), SOURCES, prompts()) == old
    assert profile(lengths(), dict(reversed(SOURCES.items())), prompts()) == old


def test_a_new_sample_of_the_same_distribution_has_no_drift(old):
    views = changed(old, lengths=lengths(1), sources={"a": 290, "b": 160, "c": 50}, prompts=prompts(1))
    assert max(views.values()) < 0.1
    assert min(views.values()) >= 0


@pytest.mark.parametrize("column", range(3))
@pytest.mark.parametrize("factor", [0.5, 2])
def test_changed_lengths_are_drift_of_that_column_only(old, column, factor):
    factors = [factor if i == column else 1 for i in range(3)]
    views = changed(old, lengths=lengths(factors=factors))
    assert views.pop(f"{PAIR_TEXTS[column]}_tokens") > 0.25
    assert max(views.values()) < 0.1


@pytest.mark.parametrize(
    "sources", [{**SOURCES, "new": 600}, {"a": 600, "b": 300}, {"c": 600, "b": 300, "a": 100}]
)
def test_changed_sources_are_drift_of_sources_only(old, sources):
    views = changed(old, sources=sources)
    assert views.pop("sources") > 0.25
    assert max(views.values()) < 0.1


@pytest.mark.parametrize("topics", [TOPICS[:1], ["entirely new words here"]])
def test_changed_prompts_are_drift_of_prompts_only(old, topics):
    views = changed(old, prompts=prompts(topics=topics))
    assert views.pop("prompts") > 0.25
    assert max(views.values()) < 0.1


@pytest.mark.parametrize("few", [["film"], ["", ""], ["film", "soup", "film"], ["film actor"] * 50])
def test_profile_of_fewer_prompts_than_clusters(few):
    old = profile(lengths(rows=3), {"a": 3}, few)
    assert len(old["prompts"]["centres"]) == len(set(few))
    assert drift(old, lengths(rows=3), {"a": 3}, few)["prompts"] == 0
    json.dumps(old, allow_nan=False)


def test_profile_of_one_pair():
    one = np.array([[5, 7, 7]], np.int32)
    old = profile(one, {"a": 1}, ["film"])
    assert max(drift(old, one, {"a": 1}, ["film"]).values()) == 0
    assert drift(old, one * 2, {"a": 1}, ["film"])["prompt_tokens"] > 0.25


def test_lengths_and_prompts_outside_the_old_range_are_drift():
    old, prompts = lengths_of(5), [f"Film {i}?" for i in range(80)]
    before = profile(old, {"web": 80}, prompts)
    views = drift(before, lengths_of(2), {"web": 80}, [f"Write about soup number {i}" for i in range(80)])
    assert views["chosen_tokens"] > 0.25
    assert views["prompts"] > 0.25
    assert drift(before, old, {"web": 80}, prompts)["prompts"] == pytest.approx(0, abs=1e-9)


def lengths_of(tokens):
    return np.full((80, 3), tokens, np.int32)
