"""Short completions that fit any prompt, such as closing lines. They are in both splits without being a leak."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from dpo.data.formats import normalize

SHORT_TEXT = 25
"""Maximum number of words of a completion that can fit any prompt."""
RARE = 1000
"""A word is rare if it is in at most one of this number of rows with other completions."""
SAMPLED_ROWS = 10_000
"""Maximum number of rows whose words are counted."""
PROMPTS = 3
"""A text that answers so many prompts and is about none of them fits any prompt, also if its words are rare."""

NO_SPACES = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
"""Characters of scripts that do not separate words: Thai, Lao, Burmese, Khmer, Japanese and Chinese."""
WORD = re.compile(rf"[{NO_SPACES}]+|[^\W{NO_SPACES}]+(?:['’][^\W{NO_SPACES}]+)*")


def words(text: str) -> set[str]:
    """Return the distinct words of a normalized text. Without spaces, a word is two neighbouring characters."""
    found = set()
    for word in WORD.findall(text):
        unspaced = re.match(rf"[{NO_SPACES}]", word)
        found |= {word[i : i + 2] for i in range(max(1, len(word) - 1))} if unspaced else {word}
    return found


def fitting_any_prompt(texts: Mapping[str, Collection[str]], sample: Iterable[Sequence[str]]) -> set[str]:
    """Return which of the normalized `texts` fit any prompt.

    These are texts that have no rare word in common with their prompts and no rare number. At most half of their
    words are rare, or they answer several prompts. A text about its prompt, or with rare words, is a copy if it
    occurs twice.

    Args:
        texts: short completions with the different prompts of their rows.
        sample: prompt and completions of rows of the data, in which words are counted.
    """
    counts, rows = Counter[str](), 0
    own: dict[str, Counter[str]] = {text: Counter() for text in texts}
    for row in sample:
        normalized = [normalize(text) for text in row]
        present = set().union(*map(words, normalized))
        counts.update(present)
        rows += 1
        for text in {text for text in normalized[1:] if text in own}:
            own[text].update(present)
    fitting = set()
    for text, prompts in texts.items():
        distinct = words(text)
        rare = {word for word in distinct if counts[word] - own[text][word] <= rows // RARE}
        is_about = any(not rare.isdisjoint(words(normalize(prompt))) for prompt in prompts)
        has_number = any(character.isdigit() for word in rare for character in word)
        is_usual = 2 * len(rare) <= len(distinct) or len(prompts) >= PROMPTS
        if is_usual and not is_about and not has_number:
            fitting.add(text)
    return fitting
