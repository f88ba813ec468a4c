"""Regular expressions over names match like Python's, in bounded time."""

import contextlib
import random
import re
import time

import pytest

import rasa_ext
from rasa_ext.methods.patterns import check_pattern, matches_end, matches_whole

SINGLE = ("a", "b", r"\.", ".", "[ab]", "[^a]", r"\w", r"\d", "1", r"\b", "^", "$", "(?i:A)")
REPEATS = ("*", "+", "?", "*?", "{1,2}", "{2}", "{0,3}?")


def drawn(draw: random.Random, depth: int = 0) -> str:
    kind = draw.randrange(12)
    if depth > 3 or kind < 4:
        return draw.choice(SINGLE)
    inner = drawn(draw, depth + 1)
    if kind < 6:
        return inner + drawn(draw, depth + 1)
    if kind < 7:
        return f"({inner}|{drawn(draw, depth + 1)})"
    if kind < 9:
        return f"(?:{inner}){draw.choice(REPEATS)}"
    if kind < 10:
        return f"(?{draw.choice('=!')}{inner})"
    return f"(?<{draw.choice('=!')}{draw.choice(('a', '.', '[.1]'))})"


def test_they_match_what_python_s_own_matcher_does():
    draw, found = random.Random(0), {True: 0, False: 0}
    for _ in range(3000):
        pattern = drawn(draw)
        name = "".join(draw.choices("ab.1", k=draw.randrange(7)))
        whole = re.fullmatch(pattern, name) is not None
        assert matches_whole(pattern, name) == whole, (pattern, name)
        end = re.search(rf"(^|\.)(?:{pattern})$", name) is not None
        assert matches_end(pattern, name) == end, (pattern, name)
        found[end] += 1
    assert min(found.values()) > 500


NAME = "model.layers.0.self_attn.q_proj" + 40 * "a"


@pytest.mark.parametrize("pattern", ["(.*)*x", "(a|a)*b", "(|)" * 40 + "x", ".*" * 18 + "x"])
def test_patterns_that_python_s_own_matcher_does_not_get_done_with(pattern):
    began = time.thread_time()
    assert not matches_whole(pattern, NAME)
    with contextlib.suppress(ValueError):  # may be refused as too slow
        assert not matches_end(f"q_proj({pattern})", NAME)
        assert matches_whole(f"({pattern})?.*", NAME)
    assert time.thread_time() - began < 3


def test_a_pattern_that_takes_too_long_is_refused_over_all_names_together():
    slow, began = r"(?:.*?,){25}z", time.thread_time()
    names = ["," * count for count in range(20, 300)]
    with pytest.raises(ValueError, match=r"is matched within 1\.0 s, got '\(\?:"):
        any(matches_whole(slow, name) for name in names)
    with pytest.raises(ValueError, match="is matched within"):
        matches_whole(slow, "")
    assert time.thread_time() - began < 3


NONE = [
    ("(", "missing"),
    ("a{99999999999999}", "10000 counted repetitions"),
    ("((a{1000}){1000}){1000}", "10000 counted repetitions"),
    ("((a{2,1000}){1000}){9}", "10000 counted repetitions"),
    (5000 * "(" + 5000 * ")", "recursion"),
    (100_001 * "a", "at most 100000 characters"),
]


@pytest.mark.parametrize(("pattern", "said"), NONE)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_what_is_none_is_refused_by_the_name_of_the_field(pattern, said, field):
    value = {pattern: 4} if field == "rank_pattern" else pattern
    with pytest.raises(ValueError, match=rf"^{field}: expected a regular expression.*{said}"):
        rasa_ext.RasaConfig(**{field: value})


def test_names_and_alternatives_may_be_long():
    """A list of all layers makes a long pattern."""
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(1000)]
    pattern = "|".join(map(re.escape, names))
    check_pattern("target_modules", pattern)
    assert matches_whole(pattern, names[-1])
    assert not matches_whole(pattern, names[-1][:-1])
