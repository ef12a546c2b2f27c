"""aquarl STAGE [key=value ...]: one word per stage, in the order a model lives through them."""

# Each command imports its own code when chosen, so `aquarl --help` is instant and `aquarl chat`
# works on a laptop without Ray. The docstrings are the help texts.

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence

from aquarl.config import (
    Config,
    RunConfig,
    load_config,
    own_settings,
    read_override,
    refuse_secrets,
    to_toml,
    with_absolute_paths,
)
from aquarl.errors import AquarlError, ClusterError, ConfigError

Arguments = argparse.Namespace


def demo(config: Config, args: Arguments) -> None:
    """everything at laptop size, on generated problems: text to report in ten minutes"""
    pipeline(config, args)


def tokenizer(config: Config, args: Arguments) -> None:
    """train the vocabulary"""
    _stages(config, "tokenizer")


def base(config: Config, args: Arguments) -> None:
    """pretrain on plain text"""
    _stages(config, "base")


def mid(config: Config, args: Arguments) -> None:
    """learn the conversation format"""
    _stages(config, "mid")


def sft(config: Config, args: Arguments) -> None:
    """learn worked solutions"""
    _stages(config, "sft")


def rl(config: Config, args: Arguments) -> None:
    """reinforce correct answers, on the Ray cluster"""
    _stages(config, "rl")


def evaluate(config: Config, args: Arguments) -> None:
    """score checkpoints: greedy, sampled, letter logits, permutations, each with its interval"""
    _evaluate(config, args)
    folder = config.run.dir
    print(
        f"This is in {folder}/results/evaluate.json now, in place of what was measured before; "
        f"`aquarl report run.dir={folder}` writes it into the page.",
        file=sys.stderr,
    )


def _evaluate(config: Config, args: Arguments) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    from aquarl.cluster.launch import run_evaluation
    from aquarl.evaluate.page import evaluation_part

    result = run_evaluation(config, args.against)
    if args.json:
        print(json.dumps(result))
    else:
        Console().print(Markdown(evaluation_part(result)))


def report(config: Config, args: Arguments) -> None:
    """write report.md, report.json and the plots of a run"""
    from aquarl.evaluate.report import write_report

    is_alone = getattr(args, "json", False)  # an object on stdout has it to itself
    path = write_report(config.run.dir, config.track.price_per_hour)
    print(f"The report is {path}", file=sys.stderr if is_alone else None)


def pipeline(config: Config, args: Arguments) -> None:
    """all stages in order, skipping those whose result stands, then evaluate and report"""
    from aquarl.cluster.connection import connected
    from aquarl.cluster.kinds import kinds_of
    from aquarl.cluster.launch import check_engine, check_evaluation, run_stages
    from aquarl.cluster.results import STAGES

    check_engine(config, kinds_of(config), config.rl.temperature)
    check_evaluation(config, args.against)
    with connected(config):
        run_stages(config, STAGES)
        _evaluate(config, args)
    report(config, args)


def grade(config: Config, args: Arguments) -> None:
    """show letter, reward and why for each line {"completion": ..., "correct": ...} of a file"""
    from aquarl.tasks.grading import grade_file

    total = n = 0.0
    for number, judged in enumerate(grade_file(args.file), start=1):
        print(f"{number:>5}  {judged.letter or '-'}  {judged.reward:g}  {judged.why}")
        total, n = total + judged.reward, n + 1
    print(f"mean reward {total / n:.4f} over {n:.0f} answers")


def chat(config: Config, args: Arguments) -> None:
    """talk to a checkpoint"""
    from aquarl.cluster.results import finished_policy
    from aquarl.data.tokenizer import Tokenizer
    from aquarl.records import Sampling
    from aquarl.serve.chat import chat as talk

    words = Tokenizer.load(f"{config.run.dir}/tokenizer")
    model = finished_policy(config.run.dir, args.stage, words.fingerprint)
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p)
    talk(model, words, sampling=sampling)


def export(config: Config, args: Arguments) -> None:
    """write a checkpoint in Hugging Face or nanochat format, read back and compared"""
    from aquarl.cluster.results import finished_checkpoint
    from aquarl.serve.export import export as write

    print(write(finished_checkpoint(config.run.dir, args.stage), args.out, args.format))


def publish(config: Config, args: Arguments) -> None:
    """send a checkpoint to the hub (hf://user/name) or a bucket"""
    from aquarl.cluster.results import finished_checkpoint
    from aquarl.serve.export import publish as send

    print(send(finished_checkpoint(config.run.dir, args.stage), args.target))


def import_nanochat(config: Config, args: Arguments) -> None:
    """take a nanochat checkpoint into run.dir"""
    from aquarl.cluster.results import record_import
    from aquarl.serve.nanochat import import_nanochat as take

    began = time.time()
    checkpoint = take(args.folder, config.run.dir, args.stage)
    record_import(config, args.stage, checkpoint, began)
    print(checkpoint)


def doctor(config: Config, args: Arguments) -> None:
    """what this machine and this cluster have and lack, each lack with what to type"""
    from aquarl.cluster.doctor import doctor as examine
    from aquarl.cluster.doctor import print_findings

    print_findings(examine(config.run.dir, config.cluster.address))


def bench(config: Config, args: Arguments) -> None:
    """speed of one piece of the work on this machine, and its distance from the limit"""
    from aquarl.bench import lines
    from aquarl.bench.work import Work

    work = Work(**{name: getattr(args, name) for name in Work.__dataclass_fields__})
    if args.kind in lines.PIECES:
        measured = lines.bench(
            args.kind,
            work,
            engines=args.engine,
            repeats=args.repeats,
            threads=args.threads,
            device=args.device,
        )
        as_text = lines.as_text
    else:
        from aquarl.cluster.bench_ray import as_text, bench_ray

        if args.device != "cpu" or args.engine != ["torch"]:
            raise ConfigError(
                f"`aquarl bench {args.kind}` measures Ray's part, on CPUs and with the torch "
                "engine alone. Leave out --device and --engine."
            )
        measured = bench_ray(
            args.kind, work, workers=args.workers, repeats=args.repeats, threads=args.threads
        )
    for line in measured:
        print(json.dumps(line) if args.json else as_text(line))


def chaos(config: Config, args: Arguments) -> None:
    """kill workers, learners and the stream of a run at random; its result must be the same"""
    from aquarl.cluster.chaos import chaos as kill_parts
    from aquarl.cluster.chaos import require, show

    outcome = kill_parts(config, minutes=args.minutes, every_s=args.every, seed=args.seed)
    show(outcome)
    require(outcome, config.run.dir)


def submit(config: Config, args: Arguments) -> None:
    """send a stage to a running cluster as a Ray job and follow it"""
    from aquarl.cluster.control import submit as send

    state = send(args.job, config)
    if state not in ("SUCCEEDED", "RUNNING"):
        raise ClusterError(f"The job ended {state}. Its last lines above say why.")


def scale(config: Config, args: Arguments) -> None:
    """change the number of rollout workers of a live run"""
    from aquarl.cluster.control import scale as change

    change(config, args.workers)
    print(f"{config.run.dir} is to have {args.workers} rollout workers.")


def status(config: Config, args: Arguments) -> None:
    """where a live run stands"""
    from aquarl.cluster.control import status as look

    print(json.dumps(look(config), indent=1))


def _stages(config: Config, *names: str) -> None:
    from aquarl.cluster.launch import run_stages

    run_stages(config, names)


def _count(text: str) -> int:
    if not text.isdigit() or text == "0":
        raise argparse.ArgumentTypeError(f"{text!r} is no count; write 1 or more")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write 5, say")
    return value


Command = Callable[[Config, Arguments], None]
COMMANDS: dict[str, Command] = {
    command.__name__.replace("_", "-"): command
    for command in (
        demo, tokenizer, base, mid, sft, rl, evaluate, report, pipeline, grade, bench, chaos,
        submit, scale, status, chat, export, publish, import_nanochat, doctor,
    )
}  # fmt: skip
BENCHES = ("rollouts", "learner", "step", "sft", "sync", "ray", "workers")
EXTRA_ARGUMENTS: dict[str, tuple[tuple[str, dict[str, object]], ...]] = {
    "grade": (("file", {"help": "JSON lines"}),),
    "bench": (
        ("kind", {"choices": BENCHES, "metavar": "WHAT", "help": ", ".join(BENCHES)}),
        ("--size", {"default": "d2", "help": "d2, d4, d8 or LAYERS,WIDTH,HEADS,VOCABULARY"}),
        ("--engine", {"nargs": "+", "choices": ("torch", "vllm"), "default": ["torch"]}),
        ("--prompts", {"type": _count, "default": 16}),
        ("--samples", {"type": _count, "default": 16, "help": "answers to each prompt"}),
        ("--max-new", {"type": _count, "default": 64, "help": "tokens of each answer"}),
        ("--rows", {"type": _count, "default": 32, "help": "of a supervised step"}),
        ("--context", {"type": _count, "default": 256, "help": "tokens of such a row"}),
        (
            "--micro-prompts",
            {"type": _count, "default": 4, "help": "that a learner takes at once"},
        ),
        ("--problems", {"metavar": "FILE", "help": "as data.task; generated ones without it"}),
        ("--threads", {"type": _count, "default": 1}),
        ("--workers", {"type": _count, "default": 2, "help": "of sync, ray and workers"}),
        ("--device", {"choices": ("cpu", "cuda"), "default": "cpu"}),
        ("--compile", {"choices": ("auto", "on", "off"), "default": "auto", "help": "of sft"}),
        ("--repeats", {"type": _count, "default": 5, "help": "after one that does not count"}),
        ("--seed", {"type": int, "default": 0}),
        ("--json", {"action": "store_true", "help": "print one JSON object a line"}),
    ),
    "chaos": (
        ("--minutes", {"type": _positive, "default": 5.0, "help": "of killing"}),
        ("--every", {"type": _positive, "default": 5.0, "help": "seconds between two, on average"}),
        ("--seed", {"type": int, "default": 0, "help": "of what is killed, and when"}),
    ),
    "scale": (("workers", {"type": int, "help": "how many"}),),
    "submit": (("job", {"help": "a stage, evaluate, report or pipeline"}),),
    "export": (
        ("out", {"help": "where to write it"}),
        ("--format", {"choices": ("hf", "nanochat"), "default": "hf"}),
    ),
    "publish": (("target", {"help": "hf://user/name, gs://... or s3://..."}),),
    "import-nanochat": (("folder", {"help": "holds model_NNNNNN.pt and its companions"}),),
    "chat": (
        ("--temperature", {"type": float, "default": 0.6, "help": "0 takes the likeliest token"}),
        ("--top-k", {"type": int, "default": 50, "help": "of the k likeliest; 0: of all"}),
        ("--top-p", {"type": float, "default": 1.0, "help": "the likeliest, up to this share"}),
        ("--max-new-tokens", {"type": int, "default": 256, "help": "the longest answer"}),
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(prog="aquarl", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="STAGE", parser_class=_Parser)
    commands.required = True
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        for flag, options in EXTRA_ARGUMENTS.get(name, ()):
            sub.add_argument(flag, **options)  # type: ignore[arg-type]
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="rl.steps=100, say")
        sub.add_argument(
            "--config",
            metavar="FILE_OR_PRESET",
            help="TOML file, or demo, aqua_cpu, d8, d20, chaos, defaults",
        )
        sub.add_argument("--dry-run", action="store_true", help="print the settings and stop")
        if name in ("chat", "export", "publish", "import-nanochat"):
            default = "sft" if name == "import-nanochat" else "rl"
            sub.add_argument(
                "--stage",
                default=default,
                choices=("base", "mid", "sft", "rl"),
                help=f"whose checkpoint ({default})",
            )
        if name in ("evaluate", "pipeline", "demo"):
            sub.add_argument("--json", action="store_true", help="print one JSON object")
            sub.add_argument("--against", metavar="DIR[:STAGE]", help="compare with another run")
    return parser


def _parse(argv: Sequence[str] | None) -> Arguments:
    """Return the arguments, key=value among them before, between and after the options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if flags := [word for word in rest if word.startswith("-")]:
        parser.error(f"there is no option {flags[0].partition('=')[0]} here")
    args.overrides += rest
    return args


def _starting_point(args: Arguments) -> str | None:
    """Return the file that the overrides change: the one named, the run's own, or the command's.

    So `aquarl evaluate run.dir=DIR` means the problems that DIR was trained for.
    """
    if args.config or args.command == "demo":
        return args.config or "demo"
    named = dict(map(read_override, args.overrides)).get("run.dir")
    if args.command == "chaos":
        return (own_settings(str(named)) if named else None) or "chaos"
    return own_settings(str(named or RunConfig().dir))


class _Parser(argparse.ArgumentParser):
    """Bad usage is one sentence, like every other mistake."""

    def error(self, message: str) -> None:  # type: ignore[override]
        message = message.replace(", key=value", "")  # named among what is missing, but optional
        raise ConfigError(f"{message}. `{self.prog} --help` shows what there is.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 2 something the user can mend."""
    name = ""
    try:
        refuse_secrets(" ".join(sys.argv[1:] if argv is None else argv))
        args = _parse(argv)
        name = f" {args.command}"
        config = load_config(_starting_point(args), args.overrides)
        if args.dry_run:
            print(to_toml(config), end="")
            return 0
        COMMANDS[args.command](with_absolute_paths(config), args)
    except AquarlError as error:
        print(f"aquarl{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"aquarl{name}: stopped; the same command goes on from here.", file=sys.stderr)
        return getattr(stop, "status", 130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
