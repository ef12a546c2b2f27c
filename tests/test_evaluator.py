"""What evaluation reports is what the policy did, for policies whose behaviour is known."""

import json
import re
from dataclasses import replace

import pytest

from aquarl.config import EvaluateConfig
from aquarl.errors import DataError
from aquarl.evaluate.evaluator import accuracies, compare, evaluate_policy, evaluation_summary
from aquarl.evaluate.scores import mcnemar_exact, wilson_interval
from aquarl.records import Problem, Sampling
from tests.fakes import ScriptedSampler, byte_tokenizer

CONFIG = EvaluateConfig(samples=4, k=(1, 2, 4), max_new_tokens=40, prompts_per_batch=3)
BYTES = byte_tokenizer()


def make_problems(n: int = 10) -> list[Problem]:
    """Problem i asks for the number i; its right letter goes A, B, C, D, E, A, ..."""
    problems = []
    for i in range(n):
        options = [str(100 + j) for j in range(5)]
        options[i % 5] = str(i)
        problems.append(Problem(f"p{i}", f"Which is {i}?", tuple(options), "ABCDE"[i % 5]))
    return problems


def right_letter(prompt: str) -> str:
    wanted = re.search(r"Which is (\d+)\?", prompt)
    assert wanted
    found = re.search(rf"^([A-E])\){wanted[1]}\D", prompt, re.MULTILINE)
    assert found
    return found[1]


def always_a(prompt: str, seed: int, sampling: Sampling) -> str:
    return "Answer: A"


def reads_options(prompt: str, seed: int, sampling: Sampling) -> str:
    return f"I look.\nAnswer: {right_letter(prompt)}"


def right_when_seed_is_even(prompt: str, seed: int, sampling: Sampling) -> str:
    return f"Answer: {right_letter(prompt)}" if seed % 2 == 0 else "a car"


def test_a_policy_that_reads_the_options_is_right_in_every_way() -> None:
    sampler = ScriptedSampler(BYTES, reads_options, lambda prompt: {right_letter(prompt): 1.0})
    result = evaluate_policy(make_problems(), BYTES, sampler, CONFIG, seed=0)
    assert result["greedy"]["accuracy"] == result["sampled"]["accuracy"] == 1.0
    assert result["letter_logit"]["accuracy"] == 1.0
    assert result["permutation"]["content_consistency"] == 1.0
    assert [shift["accuracy"] for shift in result["permutation"]["shifts"]] == [1.0] * 5


def test_a_policy_that_likes_a_letter_is_exposed() -> None:
    sampler = ScriptedSampler(BYTES, always_a)
    result = evaluate_policy(make_problems(), BYTES, sampler, CONFIG, seed=0)
    greedy, permutation = result["greedy"], result["permutation"]
    assert greedy["accuracy"] == greedy["majority_baseline"] == 0.2
    assert greedy["letters"] == {"A": 10, "B": 0, "C": 0, "D": 0, "E": 0}
    assert (greedy["low"], greedy["high"]) == wilson_interval(2, 10)
    assert greedy["mean_tokens"] == len("Answer: A") + 1
    assert permutation["accuracy"] == 0.2
    assert permutation["content_consistency"] == 0.0


def test_greedy_asks_once_at_temperature_zero_and_sampling_asks_with_different_seeds() -> None:
    sampler = ScriptedSampler(BYTES, always_a)
    config = CONFIG.model_copy(update={"permutations": False, "temperature": 0.7, "top_k": 5})
    evaluate_policy(make_problems(4), BYTES, sampler, config, seed=0)
    greedy, sampled = sampler.calls[:2], sampler.calls[2:]
    assert [len(prompts) for prompts, _, _ in sampler.calls] == [3, 1, 3, 1]
    assert all(sampling == Sampling(40, 0.0) for _, _, sampling in greedy)
    assert all(sampling == Sampling(40, 0.7, 5) for _, _, sampling in sampled)
    seeds = [seed for _, rows, _ in sampled for row in rows for seed in row]
    assert len(seeds) == len(set(seeds)) == 16


def test_a_problem_draws_the_same_samples_whatever_stands_beside_it() -> None:
    alone, among = (ScriptedSampler(BYTES, always_a) for _ in range(2))
    config = CONFIG.model_copy(update={"permutations": False})
    problems = make_problems(6)
    evaluate_policy(problems[5:], BYTES, alone, config, seed=3)
    evaluate_policy(problems, BYTES, among, config, seed=3)
    assert alone.calls[-1][1][0] == among.calls[-1][1][-1]


def test_accuracies_have_names_for_a_tracking_service() -> None:
    result = evaluate_policy(
        make_problems(), BYTES, ScriptedSampler(BYTES, right_when_seed_is_even), CONFIG, seed=0
    )
    found = accuracies(evaluation_summary("test", {"sft": result}))
    assert found["sft/greedy"] == result["greedy"]["accuracy"]
    assert found["sft/pass@1"] == result["sampled"]["accuracy"]
    assert {"sft/letter_logit", "sft/permutation", "sft/pass@4"} <= found.keys()


def test_pass_at_k_counts_the_samples_that_were_right() -> None:
    sampler = ScriptedSampler(BYTES, right_when_seed_is_even)
    sampled = evaluate_policy(make_problems(), BYTES, sampler, CONFIG, seed=0)["sampled"]
    rows = [row for _, seeds, s in sampler.calls if s.temperature > 0 for row in seeds]
    right = [sum(seed % 2 == 0 for seed in row) for row in rows]
    passed = sampled["pass_at_k"]
    assert sampled["accuracy"] == passed["1"]["accuracy"] == sum(right) / 40
    assert (sampled["low"], sampled["high"]) == (passed["1"]["low"], passed["1"]["high"])
    solved = sum(count > 0 for count in right)
    assert passed["4"]["accuracy"] == solved / 10
    assert (passed["4"]["low"], passed["4"]["high"]) == wilson_interval(solved, 10)
    assert sampled["committed_fraction"] == sum(right) / 40
    assert sampled["low"] < sampled["accuracy"] < sampled["high"]


def test_an_answer_cut_by_length_is_counted_and_commits_only_to_what_it_said() -> None:
    sampler = ScriptedSampler(BYTES, lambda prompt, seed, sampling: "I think. " * 9 + "\nAnswer: A")
    greedy = evaluate_policy(make_problems(5), BYTES, sampler, CONFIG, seed=0)["greedy"]
    assert greedy["cut_fraction"] == 1.0
    assert greedy["committed_fraction"] == greedy["accuracy"] == 0.0
    assert greedy["mean_tokens"] == 40


@pytest.mark.parametrize("merged", [(), (b" A", b" B", b" C", b" D", b" E"), (b" B", b" D")])
def test_letter_logits_compare_letters_however_the_vocabulary_spells_them(
    merged: tuple[bytes, ...],
) -> None:
    tokenizer = byte_tokenizer(*merged)

    def leans_right(prompt: str) -> dict[str, float]:
        return dict.fromkeys("ABCDE", 0.19) | {right_letter(prompt): 0.24}

    sampler = ScriptedSampler(tokenizer, always_a, leans_right)
    result = evaluate_policy(make_problems(), tokenizer, sampler, CONFIG, seed=0)
    assert result["letter_logit"]["accuracy"] == 1.0
    assert result["letter_logit"]["chosen"] == list("ABCDEABCDE")


def test_problems_with_fewer_options_are_asked_for_fewer_letters() -> None:
    four = [
        replace(p, options=p.options[:4], letters="ABCD")
        for p in make_problems()
        if p.answer_letter != "E"
    ]
    sampler = ScriptedSampler(
        BYTES,
        lambda prompt, seed, sampling: "Answer: E",
        lambda prompt: {"A": 0.3, "B": 0.1, "C": 0.1, "D": 0.1, "E": 0.4},
    )
    result = evaluate_policy(four, BYTES, sampler, CONFIG, seed=0)
    assert result["greedy"]["committed_fraction"] == 0.0
    assert set(result["letter_logit"]["chosen"]) == {"A"}
    assert len(result["permutation"]["shifts"]) == 4


def test_problems_whose_options_cannot_be_told_apart_are_not_permuted() -> None:
    fixed = [replace(problem, options=()) for problem in make_problems(3)]
    result = evaluate_policy(fixed, BYTES, ScriptedSampler(BYTES, always_a), CONFIG, seed=0)
    assert "permutation" not in result


def test_models_are_compared_on_the_same_problems() -> None:
    def half(prompt: str, seed: int, sampling: Sampling) -> str:
        return reads_options(prompt, seed, sampling) if "Which is 1?" not in prompt else "no"

    problems = make_problems()
    results = {
        name: evaluate_policy(problems, BYTES, ScriptedSampler(BYTES, policy), CONFIG, seed=0)
        for name, policy in (("mid", always_a), ("sft", half), ("rl", reads_options))
    }
    summary = evaluation_summary("validation", results)
    assert (summary["split"], summary["n"]) == ("validation", 10)
    first, second = summary["comparisons"]
    assert (first["a"], first["b"], first["a_only"], first["b_only"]) == ("mid", "sft", 0, 7)
    assert first["difference"] == 0.7
    assert first["p_value"] == mcnemar_exact([False] * 7, [True] * 7) == 2 / 2**7
    assert (second["b_only"], second["both"], second["p_value"]) == (1, 9, 1.0)
    assert json.loads(json.dumps(summary)) == summary


def test_other_problems_are_not_compared() -> None:
    sampler = ScriptedSampler(BYTES, always_a)
    a, b = (
        evaluate_policy(p, BYTES, sampler, CONFIG, 0) for p in (make_problems(3), make_problems(4))
    )
    with pytest.raises(DataError, match="different problems"):
        compare(a, b)


def test_only_so_many_problems_are_scored_and_none_is_an_error() -> None:
    sampler = ScriptedSampler(BYTES, always_a)
    config = CONFIG.model_copy(update={"problems": 4, "permutation_problems": 2})
    result = evaluate_policy(make_problems(), BYTES, sampler, config, seed=0)
    assert result["n"] == result["sampled"]["n"] == 4
    assert result["permutation"]["n"] == 2
    with pytest.raises(DataError, match="no problems"):
        evaluate_policy([], BYTES, sampler, config, seed=0)
