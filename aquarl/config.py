"""Settings in, one frozen and checked `Config` out: defaults, then a TOML file, then `key=value`.

The defaults are nanochat's where it has one; the demo that the README reports is the preset "demo".
A preset is a TOML file in `ray_jobs/`, named without its ending. A run directory keeps the
settings it was made with, and later commands start from those. Unknown keys are refused with the
nearest name that exists.
"""

from __future__ import annotations

import difflib
import glob
import json
import math
import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import fsspec
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_serializer,
    model_validator,
)

from aquarl.errors import ConfigError
from aquarl.storage import get

JOB_FOLDER = "/working_dir_files/"
"""Ray unpacks a job's `working_dir` below a folder of this name."""
SECRET = re.compile(
    r"://[^@\s]*:[^@\s]*@|https?://[^/@\s]+@"
    r"|[?&][^=&\s]*(auth|credential|key|password|secret|sig|token)[^=&\s]*=",
    re.IGNORECASE,
)
"""How a URL looks that has a password in it."""
PRESETS = Path(__file__).resolve().parent.parent / "ray_jobs"
OWN_NAMES = {"arithmetic", "aqua", "hub"}
"""In `data.task` and `data.corpus` these are never a file or folder that happens to be here."""
MidSource = Literal["chat", "gsm8k", "mmlu", "arc", "task", "easy"]

Seconds = Annotated[float, Field(gt=0, le=7 * 24 * 3600)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    dir: str = Field("runs/demo", min_length=1)
    """Run directory: local, or `gs://...`, `s3://...`."""
    seed: int = 0


class DataConfig(Section):
    """What is read. With `root`, files of the shapes the README shows; without, hub names."""

    root: str | None = None
    """Folder or bucket with `aqua/`, `gsm8k/`, `mmlu/`, `arc/`, `chat/`, `corpus/` in it."""
    task: str = "arithmetic"
    """The problems of SFT, RL and evaluation: "arithmetic", "aqua", or a JSONL file."""
    corpus: tuple[str, ...] = ("arithmetic",)
    """Text of the base stage: "arithmetic" (generated facts), "hub", or files below `root`."""
    mid: dict[MidSource, NonNegativeFloat] = Field(default={"task": 1.0})
    """Mixture of the mid stage: source ("task": the problems of `task`, "easy": generated ones of
    one step) to passes over it."""
    permute_options: bool = False
    """Shuffle each training problem's options, so that no letter is likelier than another."""
    max_train_problems: PositiveInt | None = None
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of a task's training questions held out when its files have no validation split (of one
    JSONL file as much again for test); also of the corpus, of chat and of GSM8K."""
    difficulty: int = Field(2, ge=1, le=4)
    """Of generated problems: the most steps of arithmetic in one."""
    largest_number: int = Field(20, ge=5, le=99)
    """Of generated problems: the largest number in a question."""
    train_problems: PositiveInt = 20_000
    """How many problems to generate for training."""
    held_out_problems: PositiveInt = 600
    """How many problems to generate for validation, and as many again for test."""


class TokenizerConfig(Section):
    vocab_size: int = Field(512, ge=265)
    """Byte tokens (256), special tokens (9) and merges together."""
    train_chars: PositiveInt = 2_000_000
    """How much of the corpus to train on."""


class ModelConfig(Section):
    """One dial, `depth`, derives the rest: width 64 * depth, the fewest heads of at most 128 (by
    eights, which GPUs want), rates."""

    depth: PositiveInt = 2
    width: PositiveInt | None = None
    heads: PositiveInt | None = None
    kv_heads: PositiveInt | None = None
    """Fewer than `heads`: grouped-query attention (arXiv:2305.13245)."""
    context: PositiveInt = 256
    """T: the longest row."""

    @property
    def resolved_width(self) -> int:
        return self.width or 64 * self.depth

    @property
    def resolved_heads(self) -> int:
        if self.heads:
            return self.heads
        width = self.resolved_width
        least = max(1, -(-width // 128))
        even = (n for n in range(least, width // 32 + 1) if width % (8 * n) == 0)
        return next(even, least)

    @property
    def resolved_kv_heads(self) -> int:
        return self.kv_heads or self.resolved_heads

    @model_validator(mode="after")
    def _divides(self) -> Self:
        width, heads, kv = self.resolved_width, self.resolved_heads, self.resolved_kv_heads
        if width % heads or (width // heads) % 2:
            raise ConfigError(
                f"model.width is {width} and model.heads is {heads}, but each head needs an even, "
                f"whole share of the width. Try model.width={-(-width // (2 * heads)) * 2 * heads}."
            )
        if heads % kv:
            raise ConfigError(
                f"model.kv_heads is {kv}, but it must divide model.heads, which is {heads}. "
                f"Try model.kv_heads={heads}."
            )
        return self


class OptimConfig(Section):
    """Learning rates of nanochat's Muon + AdamW groups, before their width scaling."""

    matrix_lr: PositiveFloat = 0.02
    """Muon, or AdamW with `optimizer="adamw"`, on the weight matrices of the blocks."""
    embedding_lr: PositiveFloat = 0.2
    unembedding_lr: PositiveFloat = 0.004
    weight_decay: NonNegativeFloat = 0.0
    """On embedding and unembedding, as in nanochat."""
    optimizer: Literal["muon", "adamw"] = "muon"
    lr_scale: PositiveFloat = 1.0
    """Multiplies every learning rate of the stage."""
    warmup: float = Field(0.0, ge=0, le=1)
    """Share of the steps over which the rate rises linearly from 0."""
    warmdown: float = Field(0.2, ge=0, le=1)
    """Share of the steps over which it falls linearly to `final_lr`."""
    final_lr: float = Field(0.0, ge=0, le=1)
    """As a fraction of the peak."""
    clip_norm: PositiveFloat = 1.0


class SupervisedConfig(OptimConfig):
    """One supervised stage. A step is `batch_tokens`, however many workers share it."""

    steps: PositiveInt = 100
    batch_tokens: PositiveInt = 8_192
    """Positions in one optimizer step over all workers and microbatches."""
    micro_rows: PositiveInt = 32
    """B: rows of `model.context` positions in one forward pass."""
    eval_every: PositiveInt = 100
    eval_rows: PositiveInt = 64
    save_every: PositiveInt = 200

    def rows_in_step(self, context: int) -> int:
        """Return how many rows of so many positions a step is, unless more workers share it."""
        return max(1, self.batch_tokens // context)


class Workers(Section):
    """How many workers: one count, or the least and the most, as `{min = 1, max = 4}`."""

    min: PositiveInt
    max: PositiveInt

    @model_validator(mode="before")
    @classmethod
    def _from_a_count(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"min": value, "max": value}
        if isinstance(value, cls) or (isinstance(value, dict) and {"min", "max"} <= value.keys()):
            return value
        raise ValueError("write one count, or the least and the most, as {min = 1, max = 4}")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"the least is more than the most; try max = {self.min}")
        return self

    @model_serializer
    def _as_written(self) -> int | dict[str, int]:
        return self.min if self.min == self.max else {"min": self.min, "max": self.max}


class RLConfig(OptimConfig):
    """Settings of the RL stage. Counts are per optimizer step."""

    lr_scale: PositiveFloat = 0.1
    """Multiplies every learning rate of the stage. At 0.25 the reward of the demo fell."""
    steps: PositiveInt = 100
    prompts_per_step: PositiveInt = 16
    """P: different problems in one step."""
    rollouts_per_prompt: PositiveInt = 16
    """G: answers sampled for each problem; advantages compare these with one another."""
    prompts_per_lease: PositiveInt = 8
    """The unit of sampling: what one rollout worker takes at a time."""
    max_new_tokens: PositiveInt = 64
    temperature: float = Field(1.0, ge=0.2)
    """Used to sample and, identically, to score the sampled tokens in the learner."""
    top_k: NonNegativeInt = 0
    top_p: float = Field(1.0, gt=0, le=1)
    engine: Literal["torch", "vllm"] = "torch"
    """Who samples: plain torch, or vLLM, which is an extra install and pays on GPUs."""
    rollout_workers: Workers = Workers(min=1, max=1)
    """Between the least and the most the run decides for itself (`aquarl/rl/pool_size.py`)."""
    max_staleness: int = Field(1, ge=0, le=8)
    """How many versions behind the learner a group may have been sampled; 0 is on-policy. Above 2 a
    run can fall for good, unless `loss` is "ppo" (docs/staleness.md)."""
    inflight_updates: bool = False
    """Take newer weights between two tokens of an answer, not only between leases. Fresher tokens,
    and with `max_staleness` above 0 a run is then not repeatable. Torch engine only."""
    loss: Literal["reinforce", "ppo", "gspo", "cispo"] = "reinforce"
    advantage: Literal["mean", "std", "rloo", "global"] = "mean"
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: PositiveFloat = 0.28
    """The ratio may move within [1 - clip_low, 1 + clip_high] (arXiv:2503.14476)."""
    correct_staleness: bool = True
    """Weigh each token by policy / sampler under REINFORCE; the other losses have ratios anyway."""
    ratio_cap: PositiveFloat = 5.0
    """Where that weight is truncated (arXiv:1802.01561)."""
    mask_ratio: float = Field(math.inf, gt=1)
    """Answers whose mean ratio is above this, or below one over it, are left out of the loss."""
    kl_weight: NonNegativeFloat = 0.0
    """Weight of the k3 estimate of KL(policy || SFT policy) in the loss."""
    format_bonus: NonNegativeFloat = 0.0
    """Added for an answer line of the right form, right or wrong."""
    refill_uniform_groups: bool = False
    """Sample further problems in place of groups whose rewards are all equal."""
    micro_prompts: PositiveInt = 8
    """Prompts (each with its G answers) in one forward pass of the learner."""
    eval_every: PositiveInt = 25
    eval_problems: PositiveInt = 100
    save_every: PositiveInt = 25
    transcripts_per_step: NonNegativeInt = 2
    wait_timeout_s: Seconds = 300.0
    """How long the learner waits with no group coming in before it gives up with a reason."""
    lease_timeout_s: Seconds = 120.0
    """Who has not finished a lease by then is replaced, and the lease issued again. Shorter than
    `wait_timeout_s`, so that a worker that hangs does not end the run."""
    worker_restarts: NonNegativeInt = 20
    """Rollout workers hired in place of others that may die, too, with no group finished between
    them, before the run ends with an error. Several that one lease kills count once, those that
    raise an error one by one, hired in place of others or not."""
    lease_deaths: PositiveInt = 3
    """Workers that may die over one lease before it is set aside: reported, and not trained."""

    @model_validator(mode="after")
    def _has_siblings(self) -> Self:
        if self.rollouts_per_prompt < 2:
            raise ConfigError(
                f"rl.rollouts_per_prompt is {self.rollouts_per_prompt}, but an answer is judged "
                "against other answers to the same problem, so at least 2 are needed. "
                "Try rl.rollouts_per_prompt=8."
            )
        if self.prompts_per_step % self.prompts_per_lease:
            raise ConfigError(
                f"rl.prompts_per_step is {self.prompts_per_step} and rl.prompts_per_lease is "
                f"{self.prompts_per_lease}, but a step is made of whole leases. "
                f"Try rl.prompts_per_lease={self.prompts_per_step}."
            )
        if self.inflight_updates and self.engine != "torch":
            raise ConfigError(
                f"rl.inflight_updates is on, but rl.engine={self.engine} takes new weights between "
                "leases only. Try rl.engine=torch, or leave rl.inflight_updates out."
            )
        if self.top_k or self.top_p != 1.0:
            raise ConfigError(
                "rl.top_k and rl.top_p cut the distribution that is sampled, but the learner "
                "scores the whole one, so the gradient would be of another policy. "
                "Leave both out in RL; evaluate.top_k and evaluate.top_p are there for evaluation."
            )
        if self.lease_timeout_s >= self.wait_timeout_s:
            raise ConfigError(
                f"rl.lease_timeout_s is {self.lease_timeout_s:g}, but learners give up after "
                f"rl.wait_timeout_s={self.wait_timeout_s:g}, so a worker that hangs would end the "
                f"run before it is replaced. Try rl.wait_timeout_s={3 * self.lease_timeout_s:g}."
            )
        return self


class EvaluateConfig(Section):
    problems: PositiveInt = 500
    """How many problems of the split to score; all of them if it has fewer."""
    split: Literal["validation", "test"] = "test"
    samples: PositiveInt = 8
    """Sampled answers per problem, for pass@1 and pass@k."""
    k: tuple[PositiveInt, ...] = Field((1, 4, 8), min_length=1)
    temperature: float = Field(1.0, ge=0.01, le=100)
    top_k: NonNegativeInt = 0
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: PositiveInt = 64
    stages: tuple[Literal["base", "mid", "sft", "rl"], ...] = Field(("sft", "rl"), min_length=1)
    """Whose checkpoints `aquarl evaluate` scores."""
    permutations: bool = True
    """Also score every cyclic shift of the options (greedy)."""
    permutation_problems: PositiveInt = 100
    prompts_per_batch: PositiveInt = 50

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if max(self.k) > self.samples:
            raise ConfigError(
                f"evaluate.k asks for pass@{max(self.k)}, but only evaluate.samples="
                f"{self.samples} answers are drawn. Try evaluate.samples={max(self.k)}."
            )
        return self


class RolloutKind(Section):
    """One kind of rollout worker, where a pool has several."""

    count: PositiveInt = 1
    """Kinds are hired in their order until there are so many of each; then more of the last."""
    engine: Literal["torch", "vllm"] = "torch"
    cpus: PositiveFloat = 1.0
    gpus: NonNegativeFloat = 0.0


Compile = Literal["auto", "on", "off"]


class ClusterConfig(Section):
    """What Ray is asked for."""

    address: str | None = None
    """HOST:6379; for `aquarl submit` the dashboard's, http://HOST:8265. None: a Ray of our own on
    this machine, unless a job runs inside a cluster already."""
    learners: Workers = Workers(min=1, max=1)
    """Ray Train workers of the learner. Between the least and the most Ray Train takes what there
    is and starts the group anew, from its last checkpoint, when that changes."""
    learner_cpus: PositiveFloat = 1.0
    learner_gpus: NonNegativeFloat = 0.0
    rollout_cpus: PositiveFloat = 1.0
    rollout_gpus: NonNegativeFloat = 0.0
    rollout_kinds: tuple[RolloutKind, ...] = ()
    """Several kinds in one pool, `[{count = 2, engine = "vllm", gpus = 1}, {cpus = 2}]` say, in
    place of `rl.engine`, `rollout_cpus` and `rollout_gpus`, which evaluation keeps to. Engines and
    devices differ in the last digits, so such a run is not repeatable bit for bit."""
    max_failures: NonNegativeInt = 3
    """Restarts of the learner group; granted anew, once used up, if a checkpoint came meanwhile."""
    start_timeout_s: Seconds = 180.0
    """How long one try to place the learner group may take, and evaluation's workers to start."""
    step_timeout_s: Seconds = 1800.0
    """A learner that is busy with one step for longer, its checkpoint included and waiting for
    groups not, or with what it reads before the first, is ended, its stacks in its log, and the
    group starts anew."""
    threads: PositiveInt = 1
    """CPU threads of each learner and rollout worker."""
    compile: Compile = "auto"
    """Whether `torch.compile` makes the policy of base, mid and SFT faster, after a minute or so of
    its own: on GPUs where there is a C compiler, or always, or never. RL's rows, each batch of
    another length, are never compiled for."""


class TrackConfig(Section):
    wandb: Literal["off", "offline", "online"] = "off"
    """WANDB_MODE in the environment, when set, decides instead."""
    project: str = "aquarl"
    price_per_hour: NonNegativeFloat = 0.0
    """Of the whole cluster, in any currency, for the cost column of the report."""


class Config(Section):
    """All settings of a run, one section a stage."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    base: SupervisedConfig = SupervisedConfig()
    mid: SupervisedConfig = SupervisedConfig()
    sft: SupervisedConfig = SupervisedConfig()
    rl: RLConfig = RLConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _every_learner_has_prompts(self) -> Self:
        learners, prompts = self.cluster.learners.max, self.rl.prompts_per_step
        if learners > prompts:
            raise ConfigError(
                f"cluster.learners is {learners}, but a step has rl.prompts_per_step={prompts} "
                f"prompts, and each learner needs one of its own. Try cluster.learners={prompts}, "
                f"or rl.prompts_per_step={learners}."
            )
        return self


def load_config(file_or_preset: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Return the checked configuration: defaults, then the file, then the overrides in order.

    Args:
        file_or_preset: Path of a TOML file, or the name of one in `ray_jobs/` ("aqua_cpu").
        overrides: "section.key=value" each; the value is read as TOML, else taken as text.

    Raises:
        ConfigError: The file is missing or not TOML, or a key or value cannot stand.
    """
    tree = read_toml(file_or_preset) if file_or_preset else {}
    try:
        _refuse_unknown(tree, Config, "")
    except ConfigError as error:
        raise ConfigError(f"in {file_or_preset}, {error}") from error
    for override in overrides:
        key, value = read_override(override)
        _set(tree, key.split("."), value, key)
    config = build_config(tree)
    _check_scheme(config.run.dir)
    return config


def build_config(tree: dict[str, Any]) -> Config:
    """Return the checked `Config` of a nested dict. Raises: ConfigError, naming the first fault."""
    _refuse_unknown(tree, Config, "")
    refuse_secrets(json.dumps(tree, default=str))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"] if part != "[key]")
        advice = "`aquarl pipeline --dry-run` shows the settings."
        if fault["type"] == "tuple_type":
            advice = f"Write {where}='[{_toml(fault['input'])}]'."
        elif fault["type"] == "dict_type":
            section, key = map(str, fault["loc"][:2])
            advice = f"Write {where}='{_toml(Config().model_dump()[section][key])}'."
        raise ConfigError(
            f"{where} is {_shown(fault['input'])}, but: {fault['msg'].lower()}. {advice}"
        ) from error


def refuse_secrets(text: str) -> None:
    """Raise ConfigError, without repeating it, if a URL in this text has a password in it."""
    if SECRET.search(text):
        raise ConfigError(
            "A URL with a password in it was given, but settings are kept in the run directory, "
            "its report and its logs, for everyone to read. Leave it out of the URL; storage finds "
            "it in the environment (AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, "
            "HF_TOKEN) or in its own files (~/.aws, gcloud, ~/.cache/huggingface)."
        )


def _shown(value: Any) -> str:
    """Return a wrong value as an error may show it: what is that long may be a key or a token."""
    shown = repr(value)
    return shown if len(shown) <= 24 else f"a value of {len(shown)} characters"


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with local paths made absolute: workers have folders of their own.

    A name in `data.task` is a path where such a file or folder stands here, and so is one in
    `data.corpus`, or a pattern that matches here; with `data.root` only files are, as it may have
    folders of the same names. A bucket's folder loses the "/" at its end.

    Raises:
        ConfigError: We are in a Ray job, whose folder is deleted after it, and a path is relative.
    """

    def absolute(path: str) -> str:
        if "://" in path:
            return path.rstrip("/")
        path = os.path.expanduser(path)
        if not os.path.isabs(path) and JOB_FOLDER in os.getcwd():
            raise ConfigError(
                f"{path} is relative to this Ray job's own folder, which is deleted when the job "
                f"ends. Name a place that stays: run.dir=/shared/{path} or run.dir=gs://BUCKET/..."
            )
        return os.path.abspath(path)

    def task_path(name: str) -> str:
        is_here = name not in OWN_NAMES and os.path.exists(os.path.expanduser(name))
        return absolute(name) if is_here else name

    def corpus_path(pattern: str) -> str:
        typed, with_root = os.path.expanduser(pattern), config.data.root is not None
        is_here = os.path.isfile(typed) if with_root else glob.glob(typed, recursive=True)
        return absolute(pattern) if is_here and pattern not in OWN_NAMES else pattern

    run = config.run.model_copy(update={"dir": absolute(config.run.dir)})
    root = config.data.root
    data = config.data.model_copy(
        update={
            "root": None if root is None else absolute(root),
            "task": task_path(config.data.task),
            "corpus": tuple(map(corpus_path, config.data.corpus)),
        }
    )
    return config.model_copy(update={"run": run, "data": data})


def read_toml(file_or_preset: str) -> dict[str, Any]:
    """Return what a TOML file (local, `gs://`, `s3://`) or a preset says. Raises: ConfigError."""
    place = file_or_preset
    if not _exists(place) and (PRESETS / f"{place}.toml").is_file():
        place = str(PRESETS / f"{place}.toml")
    if not _exists(place):
        names = ", ".join(sorted(p.stem for p in PRESETS.glob("*.toml")))
        names = names or "none here, as they come with the repository: work from a clone of it"
        raise ConfigError(
            f"There is no file {file_or_preset}, and no preset of that name. Presets: {names}."
        )
    try:
        return tomllib.loads(get(place).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place} is not valid TOML: {error}. Mend that line.") from error


def own_settings(run_dir: str) -> str | None:
    """Return the path of the settings that a run directory was made with, if it has them."""
    path = f"{run_dir.rstrip('/')}/config.toml"
    return path if _exists(path) else None


def _exists(path: str) -> bool:
    _check_scheme(path)
    fs, where = fsspec.url_to_fs(path)
    return bool(fs.isfile(where))


def _check_scheme(path: str) -> None:
    """Raise ConfigError if nothing here can read from such a place."""
    scheme = fsspec.core.split_protocol(path)[0] or "file"
    try:
        fsspec.get_filesystem_class(scheme)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"{path} cannot be reached: {error}. Write a folder of this machine, gs://..., or "
            "s3://..."
        ) from error


def to_toml(config: Config) -> str:
    """Return the configuration as TOML that `load_config` reads back to an equal one."""
    lines: list[str] = []
    for name, section in config.model_dump(mode="json").items():
        lines.append(f"[{name}]")
        lines += [
            f"# {key} is not set" if value is None else f"{key} = {_toml(value)}"
            for key, value in section.items()
        ]
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    # Strings, numbers and booleans are written alike, but for DEL, which TOML forbids.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_override(override: str) -> tuple[str, Any]:
    """Return key and value of "section.key=value". Raises: ConfigError, if it is not one."""
    key, separator, text = (part.strip() for part in override.partition("="))
    if not separator:
        raise ConfigError(
            f"{override!r} is not of the form key=value, so it sets nothing. "
            "Write for example rl.steps=100."
        )
    try:
        return key, tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return key, text  # rl.engine=vllm needs no quotes


def _set(tree: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"there is no setting {key}.{_nearest(key)}")
    tree[path[-1]] = value


def _refuse_unknown(tree: dict[str, Any], model: type[BaseModel], prefix: str) -> None:
    for key, value in tree.items():
        field = model.model_fields.get(key)
        if field is None:
            raise ConfigError(f"there is no setting {prefix}{key}.{_nearest(prefix + key)}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            if not prefix and not isinstance(value, dict):
                raise ConfigError(
                    f"{key} is a section, not a value. Set one of its keys, for example "
                    f"{key}.{next(iter(field.annotation.model_fields))}=..."
                )
            if isinstance(value, dict):
                _refuse_unknown(value, field.annotation, f"{prefix}{key}.")


def _all_keys() -> Iterator[str]:
    for name, section in Config().model_dump().items():
        yield from (f"{name}.{key}" for key in section)


def _nearest(key: str) -> str:
    keys = list(_all_keys())
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6) or [
        known for known in keys if known.endswith(f".{key}")
    ]
    return f" Did you mean {close[0]}?" if close else " `aquarl pipeline --dry-run` lists them all."
