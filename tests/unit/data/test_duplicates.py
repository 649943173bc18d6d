"""Comparison of rows: duplicates, near duplicates, contradictions and leaks between the splits."""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from dpo.data import duplicates
from dpo.data.duplicates import PERMUTATIONS, Fingerprints, compare, concatenate, fingerprint
from dpo.data.rules import TABLE_RULES

EXCLUDING = frozenset(TABLE_RULES)
WARNING = frozenset[str]()


def words(name, count=60):
    return [f"{name}{i}" for i in range(count)]


def text(name, count=60, **changes):
    text_words = words(name, count)
    for place, word in changes.items():
        text_words[int(place[1:])] = word
    return " ".join(text_words)


def pair(number, prompt, chosen, rejected, split="train", name=None):
    return {"id": name or f"p{number}", "prompt": prompt, "chosen": chosen, "rejected": rejected, "split": split}


def pairs_of(*rows):
    return [pair(number, *row) for number, row in enumerate(rows)]


def found(pairs, excluding=EXCLUDING, similarity=0.9):
    return [(f.rule, f.row) for f in compare(*fingerprint(pairs, range(len(pairs))), similarity, excluding)]


def test_duplicate_ids_are_found():
    pairs = [pair(i, f"{i}", f"chosen {i}", f"rejected {i}", name=f"p{i % 2}") for i in range(5)]
    findings = list(compare(*fingerprint(pairs, range(5)), 0.9, EXCLUDING))
    assert [(f.rule, f.row, f.reason) for f in findings] == [
        ("duplicate_id", 2, "the same id as row 1"),
        ("duplicate_id", 3, "the same id as row 2"),
        ("duplicate_id", 4, "the same id as row 1"),
    ]


@pytest.mark.parametrize("again", [("Say", "A joy.", "A bore."), (" say ", "A  JOY.", "a\nbore.")])
def test_duplicate_pairs_are_found_and_the_first_is_kept(again):
    pairs = pairs_of(("Say", "A joy.", "A bore."), ("Other", "One.", "Two."), again, again)
    assert found(pairs) == [("duplicate_pair", 2), ("duplicate_pair", 3)]


@pytest.mark.parametrize(
    "other", [("Sya", "A joy.", "A bore."), ("Say", "A job.", "A bore."), ("Say", "A joy.", "No")]
)
def test_pairs_that_differ_in_one_text_are_not_duplicates(other):
    assert found(pairs_of(("Say", "A joy.", "A bore."), other)) == []


def test_texts_that_differ_after_a_zero_byte_are_not_duplicates():
    assert found(pairs_of(("Say\0a", "A\0a", "B"), ("Say\0b", "A\0b", "B"))) == []


@pytest.mark.parametrize(("name", "value"), [("tools", '[{"type": "function"}]'), ("chat_template_kwargs", "{}")])
def test_pairs_with_other_tools_or_template_variables_are_neither_duplicates_nor_contradictions(name, value):
    texts = ("Say", "A joy.", "A bore."), ("Say", "A bore.", "A joy.")
    for other in texts:
        pairs = pairs_of(texts[0], other)
        assert len(found(pairs)) == (1 if other == texts[0] else 2)
        assert found([pairs[0], {**pairs[1], name: value}]) == []
        assert found([{**each, name: value} for each in pairs]) == found(pairs)
    held_out = [pair(0, *texts[0], "eval"), {**pair(1, *texts[0]), name: value}]
    assert found(held_out) == [("prompt_in_both_splits", 1), ("eval_text_in_train", 1)]


@pytest.mark.parametrize("field", [0, 1, 2])
def test_one_changed_word_of_sixty_is_a_near_duplicate(field):
    first = [text("p"), text("c"), text("r")]
    again = list(first)
    again[field] = text("pcr"[field], w30="other")
    assert found(pairs_of(first, ("Other", "One.", "Two."), again), similarity=0.85) == [
        ("near_duplicate_pair", 2)
    ]


def test_different_completions_of_a_long_prompt_are_not_near_duplicates():
    assert found(pairs_of((text("p"), text("c"), text("r")), (text("p"), text("d"), text("s")))) == []
    assert found(pairs_of((text("p", 400), "A joy.", "A bore."), (text("p", 400), "So good.", "So bad."))) == []


def test_same_short_completions_of_different_prompts_are_not_near_duplicates():
    assert found(pairs_of(*((text(f"p{i}x"), "A joy.", "A bore.") for i in range(5)))) == []
    assert found(pairs_of(("Film 1?", "A joy.", "A bore."), ("Film 2?", "A joy.", "A bore."))) == []


def test_near_duplicate_is_found_after_same_completions_of_another_prompt():
    pairs = pairs_of(
        (text("p"), text("c"), text("r")),
        (text("q"), text("c"), text("r")),
        (text("q"), text("c", w30="other"), text("r")),
    )
    ((finding),) = compare(*fingerprint(pairs, range(3)), 0.9, EXCLUDING)
    assert (finding.row, finding.reason) == (2, "almost the same pair as row 2")


def test_the_first_of_several_near_duplicates_is_kept_and_named():
    pairs = pairs_of(
        ("Other", "One.", "Two."),
        *((text("p"), text("c", 200, w30=f"other{i}"), text("r", 200)) for i in range(6)),
    )
    findings = list(compare(*fingerprint(pairs, range(7)), 0.9, EXCLUDING))
    assert [f.row for f in findings] == [2, 3, 4, 5, 6]
    assert {f.reason for f in findings} == {"almost the same pair as row 2"}


def test_memory_of_the_comparison_does_not_grow_with_rows_that_share_a_band(monkeypatch):
    """In large data most rows share a band with an earlier row. Their sketches are not copied all at once."""
    rows, draw = 20_000, np.random.default_rng(2)
    prints, sketch = fingerprint(pairs_of(("p", "c", "r")), [0])
    prints = Fingerprints(*(np.repeat(column, rows, 0) for column in vars(prints).values()))
    texts = draw.integers(2**60, size=(rows, 3)).astype(np.uint64)
    prints = dataclasses.replace(prints, row=np.arange(rows), id=np.arange(rows, dtype=np.uint64), texts=texts)
    sketches = np.repeat(sketch, rows, 0)  # equal completions, different prompts
    sketches[:, 0] = draw.integers(2**16, size=(rows, PERMUTATIONS))
    sketches[7, 0] = sketches[3, 0]

    def peak(at_once):
        monkeypatch.setattr(duplicates, "COMPARED_AT_ONCE", at_once)
        tracemalloc.start()
        findings = list(compare(prints, sketches, 0.9, EXCLUDING))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return findings, size

    (few, small), (all_rows, large) = peak(500), peak(rows)
    assert few == all_rows
    assert small < large / 3


def test_swapped_completions_are_a_contradiction_of_both_rows():
    pairs = pairs_of(("Say", "A joy.", "A bore."), ("Other", "One.", "Two."), ("say", "a bore.", "A JOY."))
    findings = list(compare(*fingerprint(pairs, range(3)), 0.9, EXCLUDING))
    assert [(f.rule, f.row) for f in findings] == [("contradiction", 0), ("contradiction", 2)]
    assert "row 3 prefers the other" in findings[0].reason
    assert "row 1 prefers the other" in findings[1].reason


def test_swapped_completions_of_another_prompt_are_not_a_contradiction():
    assert found(pairs_of(("Film 1?", "A joy.", "A bore."), ("Film 2?", "A bore.", "A joy."))) == []


def test_a_prompt_in_both_splits_is_found_in_the_training_row():
    pairs = pairs_of(
        ("Film 1?", "A joy.", "A bore.", "train"),
        ("FILM 1?", "Good.", "Bad.", "eval"),
        ("Film 2?", "So so.", "Meh.", "train"),
    )
    assert found(pairs) == [("prompt_in_both_splits", 0)]


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("good  film, I say.", "New."), ("New.", "GOOD film, I say."), ("Bad.", "New.")]
)
def test_a_held_out_completion_is_found_in_the_training_row(chosen, rejected):
    pairs = pairs_of(
        ("Film 1?", "Good film, I say.", "Bad.", "eval"),
        ("Film 2?", chosen, rejected, "train"),
        ("Film 3?", "Other.", "Another.", "train"),
        ("Film 4?", "Good film, I say.", "Third.", "eval"),
    )
    assert found(pairs) == [("eval_text_in_train", 1)]


@pytest.mark.parametrize(
    ("text", "count", "is_stock"),
    [
        ("Yes.", 3, True),
        ("Yes.", 2, False),
        ("是的", 3, True),
        ("这部电影讲述了一个关于友谊和勇气的漫长故事。", 4, False),
        ("You're welcome! If you have any other questions, feel free to ask.", 5, True),
        ("You're welcome! If you have any more questions in the future, please don't hesitate to ask.", 5, True),
        ("I'm glad I could help you today! Have a great day, and do let me know if you need more.", 5, True),
        ("I'm glad I could help you today! Have a great day, and do let me know if you need more.", 4, False),
        (" ".join(["I am sorry, but I cannot help with this request."] * 4), 8, True),
        (" ".join(["I am sorry, but I cannot help with this request."] * 4), 7, False),
        (" ".join(f"Step {n} of the long answer." for n in range(20)), 23, False),
    ],
)
def test_a_short_answer_to_enough_prompts_is_no_leak(text, count, is_stock):
    rows = [(f"Film {n}?", text, f"No {n}.", "eval" if n == 0 else "train") for n in range(count)]
    assert (found(pairs_of(*rows)) == []) == is_stock


def test_an_equal_tool_call_of_another_conversation_is_no_leak():
    call = {"role": "assistant", "content": "", "tool_calls": '[{"function": {"name": "convert"}}]'}
    said = {**call, "content": "Let me look that up for you."}
    for turn, is_leak in ((call, False), (said, True)):
        turns = {"chosen_turns": [turn], "rejected_turns": None}
        rows = [
            {**pair(n, f"Convert {n}.", "convert 5 EUR", f"No {n}.", split), **turns}
            for n, split in enumerate(("train", "eval"))
        ]
        assert found(rows) == ([("eval_text_in_train", 0)] if is_leak else [])


def test_excluded_rows_are_skipped_by_later_checks():
    pairs = [
        pair(0, "Say", "A joy.", "A bore.", "train", "same"),
        pair(1, "Say", "A joy.", "A bore.", "train", "same"),
        pair(2, "Say", "A bore.", "A joy.", "eval"),
    ]
    leaks = [("prompt_in_both_splits", 0), ("eval_text_in_train", 0)]
    contradictions = [("contradiction", 0), ("contradiction", 2)]
    assert found(pairs) == [("duplicate_pair", 1), *contradictions]
    assert found(pairs, EXCLUDING - {"contradiction"}) == [("duplicate_pair", 1), *contradictions, *leaks]
    assert found(pairs, EXCLUDING - {"duplicate_pair"}) == [
        ("duplicate_pair", 1),
        ("duplicate_id", 1),
        *contradictions,
    ]
    assert found(pairs, WARNING) == [
        ("duplicate_pair", 1),
        ("duplicate_id", 1),
        ("contradiction", 0),
        ("contradiction", 1),
        ("contradiction", 2),
        ("prompt_in_both_splits", 0),
        ("prompt_in_both_splits", 1),
        ("eval_text_in_train", 0),
        ("eval_text_in_train", 1),
    ]


def jaccard(one, other):
    shingles = [{*zip(text_words, [*text_words[1:], None], strict=True)} for text_words in (one, other)]
    return len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])


def test_estimated_similarity_is_close_to_the_jaccard_similarity():
    draw = np.random.default_rng(7)
    errors = []
    for number in range(60):
        one = [f"{number}-{word}" for word in draw.integers(10_000, size=draw.integers(20, 200))]
        other = [word if draw.random() > number / 240 else f"new{draw.integers(10_000)}" for word in one]
        _, sketches = fingerprint(pairs_of((" ".join(one), "a", "b"), (" ".join(other), "a", "b")), [0, 1])
        sketch = sketches[:, 0]
        errors.append((sketch[0] == sketch[1]).mean() - jaccard(one, other))
    assert np.abs(errors).max() < 0.2
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 1 / np.sqrt(PERMUTATIONS) / 2 + 0.02


@pytest.mark.parametrize("pairs", [[], pairs_of(("Say", "A joy.", "A bore."))])
def test_zero_or_one_row_has_no_violations(pairs):
    prints, sketches = fingerprint(pairs, range(len(pairs)))
    assert sketches.shape == (len(prints), 3, PERMUTATIONS)
    assert list(compare(prints, sketches, 0.9, EXCLUDING)) == []


def test_empty_texts_are_compared():
    assert found(pairs_of(("", "A joy.", "A bore."), ("", "Good.", "Bad."), (" ", "a joy.", "a bore."))) == [
        ("duplicate_pair", 2)
    ]


def test_results_do_not_depend_on_row_groups():
    draw = np.random.default_rng(3)
    pairs = []
    for number in range(120):
        topic, one, other = draw.integers(3, size=3)
        changed = {f"w{draw.integers(40)}": "other"} if draw.random() < 0.5 else {}
        sides = [text(f"c{one}", 40, **changed), text(f"d{other}", 40)]
        if draw.random() < 0.3:
            sides.reverse()
        split = "eval" if draw.random() < 0.2 else "train"
        pairs.append(pair(number, f"topic {topic}", *sides, split, f"p{draw.integers(110)}"))
    single, sketches = fingerprint(pairs, range(120))
    for sizes in ([40, 40, 40], [1, 0, 119], [7] * 17 + [1]):
        ends = np.cumsum(sizes)
        parts = [
            fingerprint(pairs[end - size : end], range(end - size, end))
            for size, end in zip(sizes, ends, strict=True)
        ]
        combined = concatenate([prints for prints, _ in parts])
        np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), sketches)
        for field in dataclasses.fields(Fingerprints):
            one, other = (getattr(prints, field.name) for prints in (single, combined))
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        for excluding in (EXCLUDING, WARNING):
            findings = list(compare(single, sketches, 0.8, excluding))
            assert findings == list(compare(combined, sketches, 0.8, excluding))
        assert {finding.rule for finding in findings} == set(TABLE_RULES)
