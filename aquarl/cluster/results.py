"""What a run directory says of its stages: `results/<stage>.json`, by which a stage stands.

A learner's first rank writes one when its stage is finished; `launch.run_stages` skips stages that
stand, `evaluate.report` shows them. `wall_s` runs from the end of the stage before, or from the
start of the command, to the end of this one: starting workers, preparing data, and whatever had
to be done twice are in it.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from aquarl.config import Config, to_toml
from aquarl.errors import (
    AquarlError,
    CheckpointError,
    ClusterError,
    ConfigError,
    StorageError,
)
from aquarl.evaluate.scores import validation_text
from aquarl.records import Metrics
from aquarl.storage import find, get, put

if TYPE_CHECKING:
    from aquarl.model.gpt import GPT

SUPERVISED = ("base", "mid", "sft")
STAGES = ("tokenizer", *SUPERVISED, "rl")
COMES_FROM = {"base": "tokenizer", "mid": "base", "sft": "mid", "rl": "sft"}
DEPENDS_ON = {
    "tokenizer": ("run", "data", "tokenizer"),
    "base": ("model", "base"),
    "mid": ("mid",),
    "sft": ("sft",),
    "rl": ("rl",),
}
"""Sections that decide a stage's result, beside those of the stages before it."""
WITHOUT_EFFECT = {
    "dir", "rollout_workers", "save_every", "eval_every", "eval_rows", "eval_problems",
    "micro_rows", "micro_prompts", "transcripts_per_step",
    "wait_timeout_s", "lease_timeout_s", "worker_restarts", "lease_deaths",
}  # fmt: skip
"""Keys that may change between runs and make no other policy, but for rounding."""
Settings = dict[str, dict[str, Any]]
"""Values by section and key."""
HEADLINES = (
    "vocabulary",
    "bytes_per_token",
    "loss/validation",
    "loss/bits_per_byte",
)


def tokenizer_folder(config: Config) -> str:
    return f"{config.run.dir}/tokenizer"


def stands(config: Config, stage: str) -> bool:
    """Return whether a stage was finished in this run directory with these settings.

    A checkpoint keeps the settings that it was made with, so that the rest of a stage is made with
    the same.

    Raises:
        ConfigError: It was finished, or begun, with others, or before the stage that it comes from
            was made again, or its record is damaged.
    """
    path = f"{config.run.dir}/results/{stage}.json"
    made = f"{config.run.dir}/checkpoints/{stage}"
    if stage == "tokenizer":
        made = tokenizer_folder(config)
    if (recorded := _get_record(path)) is None:
        _require_same(config, stage, _begun_with(config.run.dir, stage), "an unfinished", made)
        return False
    _require_same(config, stage, recorded["settings"], "a finished", f"{path} and {made}")
    before = COMES_FROM.get(stage)
    if before and (finished_at(config.run.dir, before) or 0) > recorded["finished"]:
        raise ConfigError(
            f"{config.run.dir} holds a {stage} stage that was made from another {before} than the "
            f"one there now. Delete {path} and {made} to make it again."
        )
    return True


def settings_made_with(run_dir: str, stage: str) -> Settings:
    """Return what `settings_of` was when a stage was made, or begun; {} if nobody knows."""
    recorded = _get_record(f"{run_dir}/results/{stage}.json")
    settings: Settings = recorded["settings"] if recorded else _begun_with(run_dir, stage)
    return settings


def _begun_with(run_dir: str, stage: str) -> Settings:
    folder = f"{run_dir}/checkpoints/{stage}"
    fs, where = fsspec.url_to_fs(folder)
    if not fs.isdir(where):
        return {}
    from aquarl.model.checkpoint import newest_facts

    settings: Settings = newest_facts(folder).get("settings", {})
    return settings


def _require_same(config: Config, stage: str, recorded: Settings, kind: str, remove: str) -> None:
    """Raise ConfigError if a stage was made, so far, with other settings than these.

    Args:
        recorded: What `settings_of` was then. What is not in it agrees.
        kind: "a finished" or "an unfinished".
        remove: What to delete to make the stage again.
    """
    for section, keys in settings_of(config, stage).items():
        for key, value in keys.items():
            before = recorded.get(section, {}).get(key, value)
            if before != value:
                raise ConfigError(
                    f"{config.run.dir} holds {kind} {stage} stage with {section}.{key}="
                    f"{json.dumps(before)}, not {json.dumps(value)}. Choose another run.dir, or "
                    f"delete {remove} to make that stage again."
                )


def require_predecessor(config: Config, stage: str) -> None:
    """Raise ConfigError if what a stage starts from does not stand."""
    before = COMES_FROM.get(stage)
    if before and not stands(config, before):
        raise ConfigError(
            f"{stage} starts from the result of {before}, which {config.run.dir} does not hold. "
            f"Run `aquarl {before}` with the same settings first, or `aquarl pipeline` for all."
        )


def settings_of(config: Config, stage: str) -> Settings:
    """Return the settings that decide a stage's result, those of the stages before it included."""
    everything = config.model_dump(mode="json")
    sections: list[str] = []
    for name in STAGES[: STAGES.index(stage) + 1]:
        sections += DEPENDS_ON[name]
    idle = WITHOUT_EFFECT
    if config.rl.advantage != "global" and not config.rl.refill_uniform_groups:
        idle = idle | {"prompts_per_lease"}  # else answers of a lease are judged, or made, together
    return {
        section: {k: v for k, v in everything[section].items() if k not in idle}
        for section in sections
    }


def record(config: Config, stage: str, since: float, metrics: Metrics, **facts: Any) -> str:
    """Write that a stage is finished, and return the line to show.

    Args:
        since: Unix seconds at which the stage began.
        metrics: The last value of each.
        facts: What else the report shows of it: steps, tokens, learners. They stand in place of
            what would be said of it here.

    Raises:
        StorageError: It cannot be written.
    """
    finished = time.time()
    summary = {
        "stage": stage,
        "started": since,
        "finished": finished,
        "wall_s": finished - since,
        "ran_on": ran_on(),
        "metrics": metrics,
        "settings": settings_of(config, stage),
        **facts,
    }
    put_json(f"{config.run.dir}/results/{stage}.json", summary)
    shown = {name: metrics[name] for name in HEADLINES if name in metrics}
    numbers = "  ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"
        for name, value in shown.items()
    )
    if validation := validation_text(metrics):
        numbers += f"  validation {validation}"
    return f"{stage:>9}  done in {finished - since:5.1f} s  {numbers.strip()}"


def record_import(config: Config, stage: str, checkpoint: str, since: float) -> None:
    """Write that a stage is finished which was trained elsewhere, and all that come before it.

    Their settings are unknown here, so whatever is asked of the next stage agrees with them.
    Raises: StorageError.
    """
    from aquarl.model.checkpoint import read_meta

    for earlier in STAGES[: STAGES.index(stage)]:
        if _get_record(f"{config.run.dir}/results/{earlier}.json") is None:
            record(config, earlier, since, {}, settings={}, wall_s=None)
    steps = read_meta(checkpoint)["step"]
    record(config, stage, since, {}, settings={}, wall_s=None, steps=steps)


def copy_up_to_sft(source: Path, folder: Path) -> None:
    """Have a new local run directory begin with all that RL starts from in another."""
    for part in ("tokenizer", "checkpoints/sft"):
        shutil.copytree(source / part, folder / part)
    (folder / "results").mkdir()
    for stage in STAGES[: STAGES.index("rl")]:
        shutil.copy(source / f"results/{stage}.json", folder / "results")


def ran_on() -> dict[str, Any]:
    """Return the hardware of the machine that asks, and how large the Ray cluster around it is."""
    import ray

    from aquarl.observe.machine import hardware

    if not ray.is_initialized():
        return hardware()
    there = ray.cluster_resources()
    return hardware() | {
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        "cluster_cpus": there.get("CPU", 0),
        "cluster_gpus": there.get("GPU", 0),
    }


def finished_at(run_dir: str, stage: str) -> float | None:
    """Return when a stage was finished (Unix seconds); None, if it was not."""
    recorded = _get_record(f"{run_dir}/results/{stage}.json")
    return None if recorded is None else float(recorded["finished"])


def finished_policy(run_dir: str, stage: str, tokenizer_fingerprint: str) -> GPT:
    """Return the policy that a stage ended with: never an earlier one in its place.

    Raises:
        CheckpointError: There is none, or it is damaged or of another vocabulary.
    """
    from aquarl.model.checkpoint import load_model

    return load_model(finished_checkpoint(run_dir, stage), tokenizer_fingerprint)


def finished_checkpoint(run_dir: str, stage: str) -> str:
    """Return the folder of the checkpoint that a stage ended with, or has reached so far.

    Raises:
        CheckpointError: There is none, or the stage is finished and its last one is damaged.
    """
    from aquarl.model.checkpoint import (
        check_checkpoint,
        checkpoint_folder,
        latest_checkpoint,
        stage_folder,
    )

    recorded = _get_record(f"{run_dir}/results/{stage}.json")
    if recorded is None or "steps" not in recorded:  # under way, or before an imported one
        newest = latest_checkpoint(stage_folder(run_dir, stage))
        if newest is None:
            raise CheckpointError(
                f"There is no whole checkpoint of the {stage} stage in {run_dir}. Run `aquarl "
                f"{stage}` with the same settings first, or name a run and a stage that are there: "
                "run.dir=DIR, evaluate.stages='[\"sft\"]', --stage sft, --against DIR:STAGE."
            )
        return newest
    folder = checkpoint_folder(run_dir, stage, recorded["steps"])
    try:
        check_checkpoint(folder)
        return folder
    except CheckpointError as error:
        raise CheckpointError(
            f"The {stage} stage in {run_dir} is finished, but what it ended with cannot be used. "
            f"{error} To make it again from there, delete {run_dir}/results/{stage}.json too and "
            f"run `aquarl {stage}`."
        ) from error


def run_and_stage(named: str, default: str) -> tuple[str, str]:
    """Return what "DIR" or "DIR:STAGE" names; the colon of gs:// is none of ours.

    Raises: ConfigError, if there is no such stage.
    """
    folder, colon, stage = named.rpartition(":")
    if not colon or "/" in stage:
        folder, stage = named, default
    if stage not in COMES_FROM:
        raise ConfigError(
            f"{named} names the stage {stage!r}, but there are only {', '.join(COMES_FROM)}. "
            f"Write {folder}:{default}."
        )
    return folder.rstrip("/"), stage


@contextmanager
def alone_in(run_dir: str) -> Iterator[None]:
    """Keep other commands of this machine from training in a run directory, if it is local.

    A lock goes with its process, however that ends. Raises: ClusterError, if another has it.
    """
    with ExitStack() as held:
        if "://" not in run_dir:
            with suppress(OSError):  # who writes there next says better what is wrong
                Path(run_dir).mkdir(parents=True, exist_ok=True)
                lock = held.enter_context(Path(run_dir, ".lock").open("w"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ClusterError(already_running(run_dir)) from None
        yield


def already_running(run_dir: str) -> str:
    return (
        f"Another command is training in {run_dir}, and two would write over each other's "
        "checkpoints. Wait for it or stop it (`aquarl status "
        f"run.dir={run_dir}` shows how far its RL is), or choose another run.dir."
    )


@contextmanager
def settings_kept(config: Config) -> Iterator[None]:
    """Keep the settings in the run directory, from where later commands take them.

    If the block fails before it has saved anything, those of before stand again.

    Raises: StorageError.
    """
    path = f"{config.run.dir}/config.toml"
    fs, where = fsspec.url_to_fs(path)
    before, there = (fs.cat_file(where) if fs.isfile(where) else None), saved(config)
    put(path, to_toml(config).encode())
    try:
        yield
    except AquarlError:
        if not has_saved_since(config, there):
            put(path, before) if before is not None else fs.rm_file(where)
        raise


def saved(config: Config) -> set[str]:
    """Return the results and whole checkpoints that there are, each by a file of it.

    Raises: StorageError.
    """
    results, files = (find(f"{config.run.dir}/{folder}") for folder in ("results", "checkpoints"))
    whole = re.compile(r"/step_\d+/meta\.json$")  # the last file of a checkpoint
    return {name for name in results if name.endswith(".json")} | set(filter(whole.search, files))


def has_saved_since(config: Config, before: set[str]) -> bool:
    """Return whether there is more than `saved` gave before; where nobody can tell, False."""
    try:
        return not saved(config) <= before
    except StorageError:
        return False


def put_json(path: str, value: Any) -> None:
    """Write a file whole or not at all. Raises: StorageError; what stood there stands."""
    put(path, json.dumps(value, indent=1).encode())


def _get_record(path: str) -> dict[str, Any] | None:
    """Return what `record` wrote there, or None where it wrote nothing."""
    try:
        body = get(path)
    except FileNotFoundError:
        return None
    try:
        found: dict[str, Any] = json.loads(body)
        if not isinstance(found, dict) or not {"finished", "settings"} <= found.keys():
            raise ValueError("it lacks the time or the settings of a stage")
        return found
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged ({error}), so it cannot be told whether that stage is finished. "
            "Delete that file and start the same command again; checkpoints are used as they are."
        ) from error
