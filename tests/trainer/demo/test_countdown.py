from __future__ import annotations

from itertools import islice, permutations

import pytest

from trainer.demo.countdown import (
    RESPONSE_TOKENS,
    RESULTS,
    ROW_TOKENS,
    WORDS,
    Problem,
    calculate,
    chains,
    demonstrations,
    draw_problems,
    held_out_problems,
    make_tokenizer,
    practice,
    solutions,
    solves,
)

PROBLEM = Problem((3, 7, 5), 26)


def problem_of(prompt: str) -> Problem:
    x, y, z, _, target, _ = prompt.split()
    return Problem((int(x), int(y), int(z)), int(target))


def test_prompt_and_response_are_the_documented_words() -> None:
    assert PROBLEM.prompt == "3 7 5 > 26 :"
    assert [chain.text for chain in solutions(PROBLEM)] == [
        "7 * 3 = 21 ; 21 + 5 = 26",
        "3 * 7 = 21 ; 21 + 5 = 26",
    ]


@pytest.mark.parametrize(
    "response",
    ["3 * 7 = 21 ; 21 + 5 = 26", "7 * 3 = 21 ; 21 + 5 = 26", " 7  * 3 = 21 ; 21 + 5 = 26 "],
)
def test_right_responses_solve(response: str) -> None:
    assert solves(PROBLEM, response)


@pytest.mark.parametrize(
    ("response", "why"),
    [
        ("3 * 7 = 22 ; 22 + 5 = 27", "both results are wrong"),
        ("3 * 7 = 22 ; 22 + 5 = 26", "the first result is wrong"),
        ("3 * 7 = 21 ; 21 + 5 = 27", "the last result is wrong"),
        ("3 * 7 = 21 ; 22 + 4 = 26", "the second step does not start from the first"),
        ("3 + 7 = 10 ; 10 + 5 = 15", "right, but another target"),
        ("3 + 7 = 10 ; 10 + 5 = 26", "claims the target"),
        ("5 * 5 = 25 ; 25 + 1 = 26", "other numbers"),
        ("3 * 7 = 21 ; 21 + 7 = 28", "a number used twice"),
        ("5 + 21 = 26", "one step"),
        ("3 * 7 = 21 ; 21 + 5 = 26 ;", "a word too many"),
        ("3 * 7 = 21 ; 21 + 5 =", "a word too few"),
        ("3 * 7 = 21 21 + 5 = 26", "no sign between the steps"),
        ("3*7=21;21+5=26", "no spaces"),
        ("3 * 7 = 021 ; 21 + 5 = 26", "a leading zero"),
        ("3 / 7 = 21 ; 21 + 5 = 26", "an operator that is not allowed"),
        ("x y z", "no numbers"),
        ("", "nothing"),
    ],
)
def test_wrong_and_malformed_responses_do_not_solve(response: str, why: str) -> None:
    assert not solves(PROBLEM, response), why


def test_every_chain_is_right_and_within_the_vocabulary() -> None:
    for chain in chains((12, 12, 1)) + chains((2, 9, 11)):
        assert calculate(chain.x, chain.first, chain.y) == chain.middle
        assert calculate(chain.middle, chain.second, chain.z) == chain.result
        assert chain.middle in RESULTS
        assert chain.result in RESULTS


def test_the_fixed_order_does_not_depend_on_the_order_shown() -> None:
    assert chains((3, 7, 5)) == chains((7, 5, 3))
    for target in range(1, 60):
        assert len({Problem(shown, target).held_out for shown in permutations((3, 7, 5))}) == 1


def test_calculate_refuses_another_operator() -> None:
    with pytest.raises(ValueError, match="`/` is not one of"):
        calculate(6, "/", 3)


def test_held_out_problems_are_different_solvable_and_never_shown() -> None:
    problems = held_out_problems(192, seed=1)
    keys = {(tuple(sorted(problem.numbers)), problem.target) for problem in problems}
    assert len(keys) == 192
    assert all(problem.held_out and solutions(problem) for problem in problems)
    shown = [problem_of(row["prompt"]) for row in demonstrations(500, noise=0.4, seed=1)]
    shown += [problem_of(row["prompt"]) for row in islice(practice(0.6, seed=1), 500)]
    assert not any(problem.held_out for problem in shown)


def test_a_seed_gives_the_same_data_and_another_seed_other_data() -> None:
    assert demonstrations(50, 0.4, seed=3) == demonstrations(50, 0.4, seed=3)
    assert demonstrations(50, 0.4, seed=3) != demonstrations(50, 0.4, seed=4)
    assert held_out_problems(20, seed=3) == held_out_problems(20, seed=3)
    assert list(islice(draw_problems(False, seed=3), 20)) != list(islice(draw_problems(False, seed=4), 20))
    assert list(islice(practice(0.6, seed=3), 20)) == list(islice(practice(0.6, seed=3), 20))


def test_demonstrations_show_the_first_solution_or_are_wrong_as_labelled() -> None:
    rows = demonstrations(1000, noise=0.4, seed=0)
    wrong = [row for row in rows if row["quality"] == "wrong"]
    assert 350 <= len(wrong) <= 450
    for row in rows:
        problem = problem_of(row["prompt"])
        first = solutions(problem)[0].text
        assert (row["completion"] == first) == (row["quality"] == "right")
        assert solves(problem, row["completion"]) == (row["quality"] == "right")
        assert row["completion"].split()[-1] == str(problem.target), "even a wrong one claims the target"


def test_without_noise_every_demonstration_is_right() -> None:
    assert all(row["quality"] == "right" for row in demonstrations(200, noise=0.0, seed=0))


def test_practice_is_right_arithmetic_that_often_misses_the_target() -> None:
    rows = list(islice(practice(reaching=0.6, seed=0), 2000))
    reached = 0
    for row in rows:
        problem = problem_of(row["prompt"])
        assert row["completion"] in {chain.text for chain in chains(problem.numbers)}
        reached += solves(problem, row["completion"])
    assert 0.6 <= reached / len(rows) <= 0.75  # some of the others reach it by chance


def test_the_tokenizer_gives_back_every_row_in_18_tokens(tmp_path) -> None:
    from transformers import AutoTokenizer

    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(WORDS) == 160
    for row in demonstrations(100, noise=0.4, seed=0):
        text = f"{row['prompt']} {row['completion']}"
        ids = tokenizer(text)["input_ids"]
        assert len(ids) + 1 == ROW_TOKENS
        assert len(tokenizer(row["completion"])["input_ids"]) + 1 == RESPONSE_TOKENS
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
