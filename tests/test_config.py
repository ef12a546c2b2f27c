"""Settings are checked where they are built, and every refusal says what to type instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from aquarl.config import (
    PRESETS,
    Config,
    ModelConfig,
    build_config,
    load_config,
    own_settings,
    to_toml,
    with_absolute_paths,
)
from aquarl.errors import ConfigError


def test_without_anything_the_defaults_stand() -> None:
    assert load_config() == Config()


def test_the_file_goes_over_the_defaults_and_the_command_line_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text("[rl]\nsteps = 7\nmax_staleness = 3\n")
    config = load_config(str(file), ["rl.steps=8", "rl.steps=9"])
    assert (config.rl.steps, config.rl.max_staleness) == (9, 3)
    assert config.rl.loss == Config().rl.loss


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("rl.loss=ppo", "rl", "loss", "ppo"),
        ("rl.clip_norm=1e-3", "rl", "clip_norm", 0.001),
        ("data.mid.chat=2", "data", "mid", {"chat": 2.0}),
        ('data.corpus=["a.txt", "b/*.zst"]', "data", "corpus", ("a.txt", "b/*.zst")),
        ("run.dir=s3://bucket/run 1", "run", "dir", "s3://bucket/run 1"),
        ("run.dir=a=b", "run", "dir", "a=b"),
        (" data.permute_options = true", "data", "permute_options", True),
    ],
)
def test_values_need_no_quotes(override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load_config(None, [override]), section), key) == value


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["rl.mask_ratio=inf", "model.width=96", "model.heads=3"],
        ["data.mid={chat = 0.5, arc = 1}", "evaluate.k=[1]", "data.max_train_problems=3"],
        [r'run.dir="tab\t, quote \", slash \\, newline \n, DEL \u007F, é 你 🙂"'],
    ],
)
def test_what_is_written_as_toml_is_read_back(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(None, overrides)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert load_config(str(file)) == config


def test_every_preset_is_a_valid_configuration() -> None:
    for preset in PRESETS.glob("*.toml"):
        assert load_config(preset.stem) == load_config(str(preset))


def test_the_presets_are_of_the_size_that_they_are_named_after() -> None:
    for depth in (8, 20):
        config = load_config(f"d{depth}")
        assert (config.model.depth, config.tokenizer.vocab_size) == (depth, 65_536)
        assert (config.data.task, config.cluster.learner_gpus > 0) == ("aqua", True)
    small = load_config("aqua_cpu")
    assert (small.data.task, small.cluster.learner_gpus) == ("aqua", 0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rl.step=10", "there is no setting rl.step. Did you mean rl.steps?"),
        ("steps=10", "Did you mean"),
        ("seed=1", "Did you mean run.seed?"),
        ("data.zzzzzzz=1", "--dry-run` lists them all"),
        ("=1", "there is no setting"),
        ("rl=3", "rl is a section, not a value"),
        ("rl.steps", "is not of the form key=value"),
        ("rl.steps.x=3", "valid integer"),
        ("rl.steps=many", "rl.steps is 'many'"),
        ("rl.steps=0", "rl.steps is 0, but: input should be greater than 0"),
        ("rl.lease_timeout_s=300", "Try rl.wait_timeout_s=900."),
        ("evaluate.k=4", "Write evaluate.k='[4]'."),
        ("data.corpus=x.txt", "Write data.corpus='[\"x.txt\"]'."),
        ("data.mid=5", "Write data.mid='{\"task\" = 1.0}'."),
        ("rl.temperature=0", "greater than or equal to 0.2"),
        ("rl.temperature=nan", "rl.temperature is nan"),
        ("rl.loss=dpo", "'reinforce', 'ppo', 'gspo' or 'cispo'"),
        ("rl.max_staleness=-1", "rl.max_staleness is -1"),
        ("rl.max_staleness=9", "rl.max_staleness is 9, but: input should be less than or equal"),
        ("rl.mask_ratio=1", "rl.mask_ratio is 1, but: input should be greater than 1"),
        ("rl.rollouts_per_prompt=1", "Try rl.rollouts_per_prompt=8."),
        ("rl.prompts_per_lease=5", "Try rl.prompts_per_lease=16."),
        ("rl.top_k=5", "the learner scores the whole one"),
        ("rl.top_p=0.9", "the learner scores the whole one"),
        ("model.heads=3", "each head needs an even, whole share"),
        ("model.width=65", "each head needs an even"),
        ("evaluate.samples=2", "Try evaluate.samples=8."),
        ("evaluate.k=[]", "at least 1 item"),
        ("evaluate.stages=[]", "at least 1 item"),
        ("tokenizer.vocab_size=264", "greater than or equal to 265"),
        ("data.validation_fraction=1", "less than 1"),
        ("track.wandb=maybe", "'off', 'offline' or 'online'"),
    ],
)
def test_what_cannot_stand_is_refused_in_one_sentence(override: str, words: str) -> None:
    # Width 128 and 16 prompts a step, whatever the demo's defaults become.
    tree = ["model.width=128", "rl.prompts_per_step=16", "rl.prompts_per_lease=8"]
    with pytest.raises(ConfigError) as refused:
        load_config(None, [*tree, override])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rl.rollout_workers=3"], (3, 3)),
        (["rl.rollout_workers={min = 1, max = 4}"], (1, 4)),
        (["rl.rollout_workers.min=2", "rl.rollout_workers.max=2"], (2, 2)),
    ],
)
def test_rollout_workers_are_a_count_or_the_least_and_the_most(
    tmp_path: Path, overrides: list[str], expected: tuple[int, int]
) -> None:
    config = load_config(None, overrides)
    assert (config.rl.rollout_workers.min, config.rl.rollout_workers.max) == expected
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert load_config(str(file)) == config
    assert build_config(config.model_dump(mode="json")) == config
    if expected == (3, 3):
        assert "rollout_workers = 3\n" in file.read_text()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rl.rollout_workers=many", "write one count, or the least and the most"),
        ("rl.rollout_workers.min=2", "write one count, or the least and the most"),
        ("rl.rollout_workers=0", "should be greater than 0"),
        ("rl.rollout_workers={min = 3, max = 2}", "try max = 3"),
        ("rl.rollout_workers={min = 3, most = 4}", "there is no setting rl.rollout_workers.most"),
        ("cluster.rollout_kinds=[{engine = 'jax'}]", "'torch' or 'vllm'"),
        ("cluster.rollout_kinds=[{gpu = 1}]", "cluster.rollout_kinds.0.gpu"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [override])
    assert words in str(refused.value)


def test_kinds_of_rollout_workers_are_read_back(tmp_path: Path) -> None:
    kinds = "cluster.rollout_kinds=[{count = 2, engine = 'vllm', gpus = 1}, {cpus = 0.5}]"
    config = load_config(None, [kinds])
    assert [kind.count for kind in config.cluster.rollout_kinds] == [2, 1]
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert load_config(str(file)) == config


def test_only_the_torch_engine_takes_weights_inside_a_generation() -> None:
    with pytest.raises(ConfigError, match=r"Try rl.engine=torch"):
        load_config(None, ["rl.inflight_updates=true", "rl.engine=vllm"])


def test_kv_heads_must_divide_heads() -> None:
    with pytest.raises(ConfigError, match=r"Try model.kv_heads=4\."):
        load_config(None, ["model.width=64", "model.heads=4", "model.kv_heads=3"])


def test_a_learner_without_prompts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Try cluster.learners=4"):
        load_config(None, ["rl.prompts_per_step=4", "rl.prompts_per_lease=4", "cluster.learners=5"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[rl]\nsteps = ", "is not valid TOML"),
        ("[rl]\nsteps = 1\nstep = 2\n", "there is no setting rl.step"),
        ("rl = 3\n", "rl is a section"),
        ("[r1]\nsteps = 3\n", "there is no setting r1"),
        ("[rl]\nsteps = 3\n[rl]\n", "is not valid TOML"),
    ],
)
def test_a_file_is_checked_like_the_command_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "my.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(str(file))
    assert words in str(refused.value) and str(file) in str(refused.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_config(str(file))


def test_a_missing_file_or_preset_names_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="no preset of that name"):
        load_config("aqua_moon")
    with pytest.raises(ConfigError, match=r"There is no file nowhere\.toml"):
        load_config("nowhere.toml")


def test_a_configuration_is_never_changed_in_place() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().rl.steps = 3  # type: ignore[misc]


def test_one_dial_derives_width_and_heads() -> None:
    deep = ModelConfig(depth=20)
    assert (deep.resolved_width, deep.resolved_heads, deep.resolved_kv_heads) == (1280, 10, 10)
    assert ModelConfig(depth=1, width=64, heads=2).resolved_kv_heads == 2


def test_a_nested_dict_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"there is no setting rl\.stepz"):
        build_config({"rl": {"stepz": 1}})


def test_local_paths_are_absolute_before_a_worker_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("{}")
    config = load_config(None, ["run.dir=runs/x", "data.root=data", "data.task=mine.jsonl"])
    whole = with_absolute_paths(config)
    assert whole.run.dir == str(tmp_path / "runs/x")
    assert whole.data.root == str(tmp_path / "data")
    assert whole.data.task == str(tmp_path / "mine.jsonl")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("a")
    (tmp_path / "aqua").mkdir()
    corpus = 'data.corpus=["texts/*.txt", "texts/", "texts", "none/*.txt", "arithmetic"]'
    here = with_absolute_paths(load_config(None, [corpus, "data.task=texts"])).data
    assert here.corpus == (
        *(f"{tmp_path}/texts/*.txt", f"{tmp_path}/texts", f"{tmp_path}/texts"),
        *("none/*.txt", "arithmetic"),
    )
    assert here.task == f"{tmp_path}/texts"
    below = with_absolute_paths(load_config(None, ['data.corpus=["texts"]', "data.root=/data"]))
    assert below.data.corpus == ("texts",)
    far = with_absolute_paths(load_config(None, ["run.dir=gs://bucket/x/", "data.task=aqua"]))
    assert (far.run.dir, far.data.task, far.data.corpus) == (
        "gs://bucket/x",
        "aqua",
        ("arithmetic",),
    )


def test_an_empty_run_directory_is_not_the_folder_we_are_in() -> None:
    with pytest.raises(ConfigError, match=r"run\.dir"):
        load_config(None, ["run.dir="])


def test_a_relative_run_directory_is_refused_inside_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "working_dir_files" / "job"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="deleted when the job ends"):
        with_absolute_paths(load_config(None, ["run.dir=runs/x"]))


def test_later_commands_start_from_the_settings_a_run_was_made_with(tmp_path: Path) -> None:
    assert own_settings(str(tmp_path)) is None
    made_with = load_config(None, ["data.difficulty=4", f"run.dir={tmp_path}"])
    (tmp_path / "config.toml").write_text(to_toml(made_with))
    assert load_config(own_settings(str(tmp_path)), ["rl.steps=7"]).data.difficulty == 4


@pytest.mark.parametrize(
    "key", ["rl.wait_timeout_s", "rl.lease_timeout_s", "cluster.start_timeout_s"]
)
def test_a_wait_without_end_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load_config(None, [f"{key}=inf"])


@pytest.mark.parametrize("sizes", [["model.width=65"], ["model.width=100", "model.heads=3"]])
def test_the_width_that_is_advised_can_stand(sizes: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"Try model\.width=\d+\.") as refused:
        load_config(None, sizes)
    advised = str(refused.value).rsplit("Try ", 1)[1].rstrip(".")
    load_config(None, [*sizes, advised])


@pytest.mark.parametrize("depth", range(1, 41))
def test_one_dial_gives_a_model_of_any_depth(depth: int) -> None:
    model = ModelConfig(depth=depth)
    width, heads = model.resolved_width, model.resolved_heads
    assert width == 64 * depth and width % (8 * heads) == 0, "a share for each that GPUs want"
    assert width // heads <= 128
    if depth % 2 == 0:
        assert width // heads == 128, "as in nanochat"
