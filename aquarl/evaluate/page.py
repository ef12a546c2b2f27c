"""What is known of a run in, the Markdown page about it out; for `report.py`, which gathers it.

Written for someone who did not run it: each table is followed by what its columns mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aquarl.evaluate.scores import accuracy_text, validation_text

MEANINGS = (
    "*Tokens*: positions of the rows, padding included; in RL, sampled tokens that were trained. "
    "*Tokens/s*: the same for each second of a step, the first left out. *Time*: from the end of "
    "the stage before, starting workers and preparing data included."
)


def markdown(facts: dict[str, Any]) -> str:
    """Return the page. It says what was run, what came out, and how far that can be trusted."""
    parts = [f"# {facts['run']}", _summary(facts), _stage_table(facts["stages"])]
    parts += [_places_part(facts), evaluation_part(facts["evaluation"])]
    parts += _pictures(facts["plots"], ("accuracy", "letters"))
    rl = [_idle_part(facts["stages"].get("rl", {})), _losses_part(facts["stages"].get("rl", {}))]
    rl += _pictures(facts["plots"], ("reward", "length", "rl_timeline"))
    supervised = _pictures(facts["plots"], ("loss", "bits_per_byte"))
    for title, section in (("RL, step by step", rl), ("Before RL", supervised)):
        if any(section):
            parts += [f"## {title}", *section]
    parts += [_transcript_part(facts["transcript"]), _environment_part(facts["environment"])]
    if facts["config"]:
        parts.append(
            "## Settings\n\n<details><summary>config.toml</summary>\n\n"
            f"```toml\n{facts['config'].strip()}\n```\n\n</details>"
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(facts: dict[str, Any]) -> str:
    stages = facts["evaluation"].get("stages", {})
    done = ", ".join(facts["stages"]) or "none"
    lines = [f"Stages: {done}. Report made {facts['made']}."]
    for stage, result in stages.items():
        greedy = result["greedy"]
        baseline = greedy["majority_baseline"]
        against = (
            "above" if greedy["low"] > baseline
            else "below" if greedy["high"] < baseline
            else "not distinguishable from"
        )  # fmt: skip
        measured = result.get("checkpoint", {}).get("step")
        which = f" (step {measured})" if measured is not None else ""
        lines.append(
            f"**{stage}**{which} solves {_interval(greedy)} of {greedy['n']} "
            f"{facts['evaluation'].get('split', '')} problems, {against} the "
            f"{_percent(baseline)} of always naming the commonest letter."
        )
    return "\n\n".join(lines)


def _stage_table(stages: dict[str, Any]) -> str:
    has_cost = any(facts["cost"] for facts in stages.values())
    has_mfu = any(facts["mfu"] is not None for facts in stages.values())
    head = ["stage", "steps", "tokens", "tokens/s", *(["MFU"] if has_mfu else []), "time"]
    head += ["learners", *(["cost"] if has_cost else []), "last"]
    rows = []
    for stage, facts in stages.items():
        last = ", ".join(f"{name} {value:.4g}" for name, value in facts["final"].items())
        if validation := validation_text(facts["metrics"]):
            last += f", validation {validation}"
        steps = _count(facts["steps"]) + ("" if facts["is_finished"] else " so far")
        row = [stage, steps, _count(facts["tokens"]), _rate(facts["tokens_per_s"])]
        row += [*([_percent(facts["mfu"])] if has_mfu else []), _time(facts["wall_s"])]
        row += [_count(facts["learners"]), *([_number(facts["cost"])] if has_cost else []), last]
        rows.append(row)
    text = f"## Stages\n\n{_table(head, rows)}\n\n{MEANINGS}" if rows else ""
    for stage, facts in stages.items():
        if facts["refused"]:
            reasons = ", ".join(f"{why}: {n}" for why, n in facts["refused"].items())
            text += f"\n\nRows left out of {stage}: {reasons}."
        if facts["cut"]:
            text += (
                f"\n\nConversations of {stage} longer than model.context, whose end was not "
                f"learned: {facts['cut']} an epoch."
            )
    return text


def _places_part(facts: dict[str, Any]) -> str:
    """Say where each stage and the evaluation ran, those of one place together."""
    places: dict[str, list[str]] = {}
    whole = facts["stages"] | {"evaluation": facts["evaluation"]}
    for name, about in whole.items():
        if ran_on := about.get("ran_on"):
            workers = about.get("rollout_workers")
            own = f" ({_plural(workers, 'rollout worker')})" if workers else ""
            places.setdefault(_place(ran_on), []).append(name + own)
    lines = [f"- {', '.join(names)}: {place}" for place, names in places.items()]
    return "### Where they ran\n\n" + "\n".join(lines) if lines else ""


def _place(ran_on: dict[str, Any]) -> str:
    text = f"{ran_on['cpu']}, {_plural(ran_on['cores'], 'core')}, {ran_on['memory_gib']} GiB"
    text += f", GPUs: {', '.join(ran_on['gpus']) or 'none'}"
    if "nodes" in ran_on:
        text += (
            f"; Ray: {_plural(ran_on['nodes'], 'node')} with {ran_on['cluster_cpus']:g} CPUs and "
            f"{ran_on['cluster_gpus']:g} GPUs"
        )
    return text


def _idle_part(rl: dict[str, Any]) -> str:
    """Say how much of their time learner and rollout workers had nothing to do."""
    learner, workers = (rl.get("idle", {}).get(who) for who in ("learner", "rollout_workers"))
    if learner is None or workers is None:
        return ""
    return (
        f"The learner waited for groups {_percent(learner)} of its steps' time; the rollout "
        f"workers were without work {_percent(workers)} of it (validating and saving left out). "
        "In the timeline, nothing is drawn for the learner while it saves."
    )


def _losses_part(rl: dict[str, Any]) -> str:
    """Say what went wrong with rollout workers on the way, if anything did."""
    stream = rl.get("stream", {})
    lost = [stream.get(name, 0) for name in ("workers_replaced", "reissued", "set_aside")]
    if not any(lost):
        return ""
    text = f"{_plural(lost[0], 'rollout worker')} died and had a successor; "
    text += f"{_plural(lost[1], 'lease')} had to be sampled again"
    if lost[2]:
        text += (
            f", and {_plural(lost[2], 'lease')} killed so many workers that RL went on without: "
            "their problems are in ledger.jsonl as `set_aside_after_deaths`"
        )
    return text + "."


def _pictures(plots: list[str], wanted: tuple[str, ...]) -> list[str]:
    return [
        f"![{Path(name).stem.replace('_', ' ')}]({name})"
        for name in plots
        if Path(name).stem in wanted
    ]


def evaluation_part(evaluation: dict[str, Any]) -> str:
    """Return what is said about `results/evaluate.json`: accuracies, answers, comparisons."""
    stages = evaluation.get("stages", {})
    outdated = ", ".join(evaluation.get("outdated", []))
    missing = (
        f"What was measured of {outdated} is of a policy that is no more, so it is left out: "
        "`aquarl evaluate` measures what stands now."
        if outdated
        else ""
    )
    if not stages:
        return missing
    ks = sorted(
        {int(k) for r in stages.values() for k in r.get("sampled", {}).get("pass_at_k", {})}
    )
    head = ["stage", "n", "greedy", "baseline", "sampled, pass@1"]
    head += [*(f"pass@{k}" for k in ks if k > 1), "letter logit"]
    how = ["stage", "committed", "cut", "tokens", "letters", "shifted options", "same content"]
    rows, how_rows = [], []
    for stage, result in stages.items():
        greedy, sampled = result["greedy"], result.get("sampled", {})
        logit, moved = result.get("letter_logit", {}), result.get("permutation", {})
        pass_at_k = sampled.get("pass_at_k", {})
        rows.append([stage, str(greedy["n"]), _interval(greedy)])
        rows[-1] += [_percent(greedy["majority_baseline"]), _interval(sampled)]
        rows[-1] += [_interval(pass_at_k.get(str(k), {})) for k in ks if k > 1] + [_interval(logit)]
        letters = " ".join(f"{letter}:{count}" for letter, count in greedy["letters"].items())
        how_rows.append([stage, _percent(greedy["committed_fraction"])])
        how_rows[-1] += [_percent(greedy["cut_fraction"]), _number(greedy.get("mean_tokens"))]
        how_rows[-1] += [letters, _interval(moved)]
        how_rows[-1] += [_percent(moved.get("content_consistency"))]
    parts = [
        f"## Accuracy ({evaluation.get('split', '')} split)\n\n{_table(head, rows)}",
        "In brackets: the 95 % interval. *Baseline*: always naming the letter that is right most "
        "often. *Greedy* reads the likeliest answer; *sampled* the mean of several; *pass@k* is "
        "the chance that one of k is right (guessing among 5: pass@4 59 %, pass@8 83 %). *Letter "
        "logit* lets the model write nothing and takes its likeliest letter: another question, "
        "not comparable with the rest.",
        *_how_it_was_measured(evaluation),
        *([missing] if missing else []),
        f"### How it answers (greedy)\n\n{_table(how, how_rows)}",
        "*Committed*: has an `Answer: X` line. *Cut*: ended by the length limit. *Shifted "
        "options*: accuracy over all rotations of the options; far below greedy means the model "
        "likes a letter. *Same content*: how often two rotations lead to the same option (always "
        "one letter: 0 %, chance: 20 %).",
    ]
    parts += [_comparison_line(test) for test in evaluation.get("comparisons", [])]
    return "\n\n".join(parts)


def _comparison_line(test: dict[str, Any]) -> str:
    verdict = (
        "that is unlikely to be chance" if test["p_value"] < 0.05 else "that could well be chance"
    )
    return (
        f"**{test['b']} against {test['a']}**, on the same {test['n']} problems: "
        f"{100 * test['difference']:+.1f} points; {test['b_only']} solved by {test['b']} alone, "
        f"{test['a_only']} by {test['a']} alone. McNemar's exact p = {test['p_value']:.2g}: "
        f"{verdict}."
    )


def _transcript_part(row: dict[str, Any]) -> str:
    if not row:
        return ""
    said = f"{row.get('prompt', '')}{row.get('answer', '')}"[:2000].replace("\n", "\n    ")
    return (
        f"## An answer from RL (step {row.get('step')}, reward {row.get('reward')}, "
        f"right: {row.get('right_letter')})\n\n    {said}"
    )


def _environment_part(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"- {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB",
        f"- GPUs: {', '.join(facts['gpus']) or 'none'}",
        f"- {versions}",
    ]
    if facts["git_commit"]:
        lines.append(f"- git {facts['git_commit']}")
    return "## Where this report was made\n\n" + "\n".join(lines)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _how_it_was_measured(evaluation: dict[str, Any]) -> list[str]:
    """Return a sentence on it, or nothing for a result that does not say."""
    if not (settings := evaluation.get("settings")):
        return []
    cut = "".join(
        f", {name.replace('_', '-')} {settings[name]:g}"
        for name, whole in (("top_k", 0), ("top_p", 1))
        if settings.get(name, whole) != whole
    )
    said = [
        f"Sampled: {settings['samples']} answers a problem at temperature "
        f"{settings['temperature']:g}{cut}. All answers end after {settings['max_new_tokens']} "
        f"tokens. The evaluation took {_time(evaluation.get('wall_s'))}.",
    ]
    if others := evaluation.get("not_its_own"):
        named = " ".join(f"{key}={value}" for key, value in others.items())
        said.append(f"**The problems are not those of this run, but those of {named}.**")
    if left_out := evaluation.get("left_out"):
        said.append(
            f"{_plural(left_out, 'problem')} of the split left out: a policy measured here was "
            "made with other settings, and trained on them."
        )
    return said


def _interval(measured: dict[str, Any] | float) -> str:
    if not measured:
        return "-"
    if isinstance(measured, float):  # pass@k as it was kept before it had an interval
        return _percent(measured)
    return accuracy_text(measured["accuracy"], measured["low"], measured["high"])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 120 else f"{minutes} min"
