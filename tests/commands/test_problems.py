"""Word problems: correct answers, equal problems for equal seeds, and disjoint splits."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from rasa_ext.commands.problems import LARGEST, SCENES, make_problems, scenes_of, split_of

TRAIN = make_problems(600, split="train", seed=1)
TEST = make_problems(200, split="test", seed=1)


@pytest.mark.parametrize("problem", [*TRAIN[:100], *TEST[:100]], ids=lambda p: p.working)
def test_the_question_has_the_numbers_and_the_working_the_answer(problem):
    told = sorted(map(int, re.findall(r"\d+", problem.question)))
    assert told == sorted(problem.numbers)
    steps = [step.split("=") for step in problem.working.split(", ")]
    assert len(steps) == len(problem.operations)
    for i, (sum_, result) in enumerate(steps):
        assert re.fullmatch(r"\d+[-+*]\d+", sum_)
        assert eval(sum_) == int(result)  # only digits and one operator, as checked above
        assert 0 <= int(result) <= LARGEST
        if i:
            assert sum_.startswith(steps[i - 1][1] + problem.operations[i])
    assert int(steps[-1][1]) == problem.answer


def test_splits_share_no_scene_sentence_or_calculation():
    assert not set(scenes_of("train")) & set(scenes_of("test"))
    assert {*scenes_of("train"), *scenes_of("test")} == set(range(len(SCENES)))
    assert {p.scene for p in TRAIN} == set(scenes_of("train"))
    assert {p.scene for p in TEST} == set(scenes_of("test"))

    def story(split: str) -> set[str]:
        scenes = [SCENES[i] for i in scenes_of(split)]
        parts = ("start", "groups", "gain", "lose")
        return {text for scene in scenes for part in parts for text in scene[part]}

    assert not story("train") & story("test")
    assert all(split_of(p.operations, p.numbers) == "train" for p in TRAIN)
    assert all(split_of(p.operations, p.numbers) == "test" for p in TEST)
    calculations = {(p.operations, p.numbers) for p in TRAIN}
    assert not calculations & {(p.operations, p.numbers) for p in TEST}
    assert not {p.question for p in TRAIN} & {p.question for p in TEST}


def test_both_lengths_all_operations_and_no_repetition():
    for problems in (TRAIN, TEST):
        lengths = [len(p.operations) for p in problems]
        assert lengths.count(2) == lengths.count(3) == len(problems) // 2
        assert {p.operations[0] for p in problems} == {"+", "-", "*"}
        assert len({p.question for p in problems}) == len(problems)


def test_the_same_seed_gives_the_same_problems_in_any_process():
    code = (
        "from rasa_ext.commands.problems import make_problems\n"
        "print(*(p.question for p in make_problems(20, split='test', seed=1)), sep='\\n')"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.splitlines() == [p.question for p in TEST[:20]]
    assert make_problems(20, split="test", seed=2) != TEST[:20]


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"split: expected 'train' or 'test', got 'dev'"):
        make_problems(1, split="dev")
    with pytest.raises(ValueError, match="count: expected 0 or more, got -1"):
        make_problems(-1, split="test")
    assert make_problems(0, split="test") == []
