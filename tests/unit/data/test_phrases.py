"""Short completions that fit any prompt are no leaks; long and rare ones are."""

import pytest

from dpo.data.phrases import fitting_any_prompt, words
from tests.support.validation import check

TOPICS = {
    "bread": "Mix flour, water and salt, knead the dough, let it rest and bake it until the crust is dark.",
    "tyres": "Lift the car, loosen the nuts, swap the wheel and check the pressure again after a day of driving.",
    "verbs": "A verb says what happens; in most questions the helping verb stands in front of the subject.",
    "loans": "Compare the yearly rate of several banks, and ask what happens if you want to pay earlier.",
    "hikes": "Start early, carry enough water, tell a friend where you go and turn back if the weather changes.",
    "plants": "Most of them need less water in winter; feel the soil with a finger before you water them again.",
    "guitar": "Tune it first, then practise slow changes between two chords for ten minutes every day.",
    "email": "Open the settings, choose the account and enter the address of the server that your office uses.",
}
CLOSINGS = [
    "You're welcome! If you have any more questions, feel free to ask.",
    "You're welcome! Have a great day!",
    "I'm glad I could help! Feel free to ask if you have any other questions.",
    "Have a great day!",
    "Happy to help! Let me know if you need anything else.",
    "You're welcome! Let me know if you have any other questions.",
]
QUESTIONS = ["How do I begin with {}?", "What should I know about {}?", "Can you help me with my {}?"]


def conversations():
    """Return 72 rows of a chat: 48 answers about eight topics, and 24 closing lines, each in a few prompts."""
    rows = []
    for number in range(48):
        topic, text = list(TOPICS.items())[number % 8]
        question = QUESTIONS[number % 3].format(topic) + f" Please answer as a guide, part {number}."
        first, second = text.split(",", 1) if "," in text else text.split(";", 1)
        rows.append(
            (question, f"Part {number}: {first}, and then{second}", f"I know nothing of it, see page {number}.")
        )
    for number in range(24):
        topic = list(TOPICS)[number % 8]
        thanks = ["Thanks a lot!", "Thank you, that is all.", "Great, thanks!"][number % 3]
        prompt = f"{QUESTIONS[number // 8].format(topic)} I asked before. {thanks} ({number})"
        rows.append((prompt, CLOSINGS[(number * 7 + number // 6) % 6], f"Bye, customer {number}."))
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, "split": "eval" if number % 3 == 0 else "train"}
        for number, (prompt, chosen, rejected) in enumerate(rows)
    ]


def refused(folder, rows):
    """Return the lines that the rule quarantines."""
    result, tables = check(folder, rows)
    assert result.metrics["quarantined"] == result.metrics["rules"]["eval_text_in_train"]
    return tables["quarantine"]["line"].tolist() if "quarantine" in tables else []


def test_closing_lines_that_occur_in_few_prompts_are_accepted(tmp_path):
    rows = conversations()
    splits = {text: {row["split"] for row in rows if row["chosen"] == text} for text in CLOSINGS}
    assert {"train", "eval"} in splits.values()
    counts = [sum(row["chosen"] == text for row in rows) for text in CLOSINGS]
    assert min(counts) < 5
    assert refused(tmp_path, rows) == []


def test_a_closing_line_whose_words_occur_nowhere_else_is_accepted_from_three_prompts_on(tmp_path):
    topics = [
        {
            "prompt": f"Explain topic {n}.",
            "chosen": f"Topic {n} is about subject {n}.",
            "rejected": f"Unsure, {n}.",
        }
        for n in range(40)
    ]
    for count in (2, 3):
        closing = [
            {
                "prompt": f"Thanks for topic {n}!",
                "chosen": "You're welcome! Have a great day!",
                "rejected": f"Ok {n}.",
            }
            for n in range(count)
        ]
        rows = [{**row, "split": "train" if place % 3 else "eval"} for place, row in enumerate(closing + topics)]
        assert refused(tmp_path / str(count), rows) == ([2] if count == 2 else [])


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        (
            ("When was the Treaty of Tordesillas signed?", "What happened in 1494?"),
            "The Treaty of Tordesillas was signed in 1494.",
        ),
        (("What is the tallest mountain?", "Can you help me with my guitar?"), "Chimborazo, by one measure."),
        (
            ("How do I thicken a soup?", "Name a trick of cooks."),
            "If you want to thicken it, let the soup simmer.",
        ),
        (("Name a code.", "Another one?"), "Feel free to use the code 7731."),
        (
            ("Tell me all.", "Explain it."),
            " ".join(["You need water for the dough and you have to check it every day."] * 3),
        ),
    ],
    ids=["rare words", "a rare short text", "about its prompt", "a rare number", "long, of frequent words"],
)
def test_a_rare_or_long_text_that_is_held_out_is_refused(prompts, text, tmp_path):
    held_out, trained = (
        {"prompt": prompt, "chosen": text, "rejected": f"Not this, {split}.", "split": split}
        for prompt, split in zip(prompts, ("eval", "train"), strict=True)
    )
    rows = [*conversations(), held_out, trained]
    assert refused(tmp_path / "one", rows) == [len(rows)]
    # The held-out text may be copied to a prompt that has nothing to do with it, as the rejected completion.
    rows[-1] = {**trained, "prompt": "Can you help me with my email? Thanks!", "chosen": "No.", "rejected": text}
    assert refused(tmp_path / "two", rows) == [len(rows)]


def test_the_words_of_a_text():
    assert words("you're welcome! have a day, a day.") == {"you're", "welcome", "have", "a", "day"}
    assert words("不客气！随时") == {"不客", "客气", "随时"}
    assert words("東") == {"東"}
    assert words("도움이 필요") == {"도움이", "필요"}


def test_words_of_rows_with_the_same_text_do_not_count():
    sample = [("Thanks!", "No problem at all.", f"Bad {n}.") for n in range(20)]
    assert fitting_any_prompt({"no problem at all.": {"Thanks!"}}, sample) == set()
    others = [("Hello", "That is no problem for me.", "All of it, at once.")]
    assert fitting_any_prompt({"no problem at all.": {"Thanks!"}}, sample + others) == {"no problem at all."}
