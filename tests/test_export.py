"""What is exported computes the same elsewhere, and nothing is lost where it could not be."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load, save

import aquarl.serve.export as export_module
from aquarl.cli import main
from aquarl.cluster.results import finished_checkpoint
from aquarl.config import EvaluateConfig
from aquarl.errors import AquarlError, CheckpointError, ConfigError, StorageError
from aquarl.evaluate.evaluator import evaluate_policy, evaluation_summary
from aquarl.evaluate.report import write_report
from aquarl.model.checkpoint import checkpoint_folder, save_checkpoint
from aquarl.model.gpt import GPT
from aquarl.records import Conversation, Message, Problem, Sampling
from aquarl.serve.chat import reply
from aquarl.serve.export import export, publish
from aquarl.serve.nanochat import read_nanochat
from tests.fakes import ScriptedSampler, byte_tokenizer, random_model

transformers = pytest.importorskip("transformers", reason="exports are checked with transformers")

TOKENIZER = byte_tokenizer(b"th", b"the", b"12")
PROBLEMS = [Problem(f"p{i}", "Which?", tuple("vwxyz"), "AB"[i % 4 == 3]) for i in range(20)]


def write_measured_report(run_dir: Path) -> None:
    """Evaluate a policy that always says B, and write the run's report with the real code."""
    sampler = ScriptedSampler(TOKENIZER, lambda prompt, seed, sampling: "Answer: B")
    config = EvaluateConfig(permutations=False)
    result = evaluate_policy(PROBLEMS, TOKENIZER, sampler, config, seed=0)
    (run_dir / "results").mkdir(exist_ok=True)
    summary = json.dumps(evaluation_summary("test", {"sft": result}))
    (run_dir / "results" / "evaluate.json").write_text(summary)
    write_report(str(run_dir))


def save_run(folder: Path, model: GPT) -> str:
    TOKENIZER.save(f"{folder}/tokenizer")
    for step in (5, 12):
        save_checkpoint(
            checkpoint_folder(str(folder), "sft", step),
            model if step == 12 else GPT(model.shape),
            stage="sft",
            step=step,
            tokenizer_fingerprint=TOKENIZER.fingerprint,
        )
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("exports") / "run"
    save_run(folder, random_model(TOKENIZER.vocab_size, context=64, std=0.3))
    write_measured_report(folder)
    return str(folder)


@pytest.fixture(scope="module")
def exported(run: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("exported") / "new" / "model")
    assert f"It is in {out}." in export(finished_checkpoint(run, "sft"), out, "hf")
    return out


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@torch.inference_mode()
def test_transformers_goes_on_from_a_prompt_as_we_do(exported: str) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert type(theirs).__name__ == "NanoChatForCausalLM"
    prompt = TOKENIZER.render_prompt(Conversation((Message("user", "the 12 thieves"),)))
    ids = torch.tensor([prompt])
    ours = list(
        reply(
            random_model(TOKENIZER.vocab_size, context=64, std=0.3),
            TOKENIZER,
            prompt,
            Sampling(20, 0.0),
            torch.Generator(),
        )
    )
    answer = theirs.generate(ids, max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
    assert len(ours) > 3
    assert answer == (ours if len(ours) == 20 else [*ours, TOKENIZER.end_of_turn])


CONVERSATIONS = {
    "one question": [("user", "2+2?")],
    "turns": [("user", "12?"), ("assistant", "Answer: A"), ("user", "why?")],
    "finished": [("user", "12?"), ("assistant", "Answer: A")],
    "system": [("system", "Be brief."), ("user", "\n the {{ x }}\n\n"), ("assistant", " 🙂 ")],
    "empty message": [("user", ""), ("assistant", "")],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_chat_template_gives_our_ids(name: str, exported: str) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    turns = CONVERSATIONS[name]
    ours = Conversation(tuple(Message(role, text) for role, text in turns))
    messages = [{"role": role, "content": text} for role, text in turns]
    said = theirs.apply_chat_template(messages, return_dict=False)
    assert said == TOKENIZER.render_conversation(ours)[0]
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert asked == TOKENIZER.render_prompt(ours)


def test_the_chat_template_refuses_turns_that_do_not_alternate(exported: str) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    with pytest.raises(Exception, match="turn 2 does not"):
        theirs.apply_chat_template([{"role": "user", "content": "x"}] * 2)


def test_an_answer_stops_at_the_end_of_its_turn(exported: str) -> None:
    generation = transformers.GenerationConfig.from_pretrained(exported)
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    assert generation.eos_token_id == theirs.eos_token_id == TOKENIZER.end_of_turn
    assert theirs.bos_token_id == TOKENIZER.bos
    text = "the  12 ,\n don 't"
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs(text)["input_ids"] == TOKENIZER.encode(text)


def test_the_model_card_shows_what_was_measured(run: str, exported: str) -> None:
    card = Path(exported, "README.md").read_text()
    assert "# aquarl run: sft, step 12" in card
    line = "25.00% [11.19%, 46.87%], n = 20, always the commonest letter: 75.00%"
    assert f"| test/greedy | {line} |" in card  # Wilson interval of 5 in 20
    assert "| test/greedy/letters | A 0, B 20 |" in card
    assert "| test/sampled/pass_at_k/8 | 25.00% [11.19%, 46.87%], n = 20 |" in card
    assert str(run) not in card and "cpu" not in card.lower()  # nothing of the machine


def test_the_model_card_says_when_nothing_was_measured(run: str, tmp_path: Path) -> None:
    model = random_model(TOKENIZER.vocab_size, context=64, std=0.3)
    TOKENIZER.save(f"{tmp_path}/run/tokenizer")
    folder = checkpoint_folder(f"{tmp_path}/run", "base", 1)
    fingerprint = TOKENIZER.fingerprint
    save_checkpoint(folder, model, stage="base", step=1, tokenizer_fingerprint=fingerprint)
    export(finished_checkpoint(f"{tmp_path}/run", "base"), str(tmp_path / "out"))
    assert "Nothing was measured" in (tmp_path / "out" / "README.md").read_text()


def test_the_model_card_shows_nothing_that_was_measured_of_another_policy(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", random_model(TOKENIZER.vocab_size, context=64, std=0.3))
    Path(run, "results").mkdir()
    for made, is_told in ((5.0, True), (6.0, False)):
        result = json.dumps({"finished": made, "settings": {}, "steps": 12})
        Path(run, "results/sft.json").write_text(result)
        if is_told:
            write_measured_report(Path(run))
        out = tmp_path / f"out-{made}"
        export(finished_checkpoint(run, "sft"), str(out))
        assert ("Nothing was measured" in (out / "README.md").read_text()) != is_told


def test_a_damaged_report_is_named(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", random_model(TOKENIZER.vocab_size, context=64, std=0.3))
    for damage in ("{", "[]"):
        Path(run, "report.json").write_text(damage)
        with pytest.raises(CheckpointError, match=r"report\.json is damaged"):
            export(finished_checkpoint(run, "sft"), str(tmp_path / "out"))


def test_nanochat_format_comes_back_unchanged(run: str, tmp_path: Path) -> None:
    done = export(finished_checkpoint(run, "sft"), str(tmp_path / "out"), "nanochat")
    assert "within 0.0e+00" in done
    model, tokenizer, meta = read_nanochat(str(tmp_path / "out"))
    assert tokenizer.fingerprint == TOKENIZER.fingerprint and meta["step"] == 12
    for name, weight in (
        random_model(TOKENIZER.vocab_size, context=64, std=0.3).state_dict().items()
    ):
        assert torch.equal(model.state_dict()[name], weight)


def test_an_export_that_computes_something_else_is_not_put_in_place(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export_module.hf_files

    def with_one_wrong_weight(*args: Any, **kwargs: Any) -> dict[str, bytes]:
        files = real(*args, **kwargs)
        state = load(files["model.safetensors"])
        state["model.layers.1.mlp.fc2.weight"][0, 0] += 0.1
        return files | {"model.safetensors": save(state, metadata={"format": "pt"})}

    monkeypatch.setattr(export_module, "hf_files", with_one_wrong_weight)
    with pytest.raises(CheckpointError, match="not put in place"):
        export(finished_checkpoint(run, "sft"), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_weights_of_nan_are_not_exported(tmp_path: Path) -> None:
    model = random_model(TOKENIZER.vocab_size, context=64, std=0.3)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    run = save_run(tmp_path / "run", model)
    with pytest.raises(CheckpointError, match="nan"):
        export(finished_checkpoint(run, "sft"), str(tmp_path / "out"), "nanochat")
    assert not (tmp_path / "out").exists()


def test_an_export_replaces_nothing(run: str, exported: str) -> None:
    before = files_below(Path(exported))
    for out in (exported, str(Path(exported) / "config.json")):
        with pytest.raises(StorageError, match="already holds something"):
            export(finished_checkpoint(run, "sft"), out)
    assert files_below(Path(exported)) == before


def test_an_empty_folder_is_filled(run: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(finished_checkpoint(run, "sft"), str(tmp_path / "out"), "nanochat")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["meta_000012.json", "model_000012.pt", "token_bytes.pt", "tokenizer.pkl"]


def test_a_place_that_cannot_be_written_is_named(run: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    out = str(tmp_path / "file" / "out")
    with pytest.raises(StorageError, match="Could not write to"):
        export(finished_checkpoint(run, "sft"), out)
    with pytest.raises(StorageError, match="Could not write to nosuch://"):
        export(finished_checkpoint(run, "sft"), "nosuch://bucket/out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_exported_is_told_in_one_sentence(run: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint of the rl .* `aquarl rl`"):
        export(finished_checkpoint(run, "rl"), out)
    with pytest.raises(ConfigError, match="no format 'gguf'"):
        export(finished_checkpoint(run, "sft"), out, "gguf")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="aquarl publish hf://ada/x"):
        export(finished_checkpoint(run, "sft"), "hf://ada/x")


def test_without_transformers_nothing_is_written_unchecked(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AquarlError, match="pip install -U transformers"):
        export(finished_checkpoint(run, "sft"), str(tmp_path / "out"), "hf")
    assert list(tmp_path.iterdir()) == []
    export(finished_checkpoint(run, "sft"), str(tmp_path / "out"), "nanochat")  # needs none


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A real S3 protocol on this machine; returns the address of an empty bucket."""
    moto_server = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    import s3fs

    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        fsspec.filesystem("s3").mkdir("aquarl-test")
        yield "s3://aquarl-test"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_bucket_receives_what_was_checked(
    run: str, exported: str, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"{bucket}/models/sft"
    assert main(["publish", address, f"run.dir={run}", "--stage", "sft"]) == 0
    assert f"It is in {address}." in capsys.readouterr().out
    fs = fsspec.filesystem("s3")
    fs.get(f"{address}/", f"{tmp_path}/", recursive=True)
    arrived = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert arrived == {p.name: p.read_bytes() for p in Path(exported).iterdir()}

    with pytest.raises(StorageError, match="already holds something"):
        publish(finished_checkpoint(run, "sft"), address)
    assert len(fs.ls(address)) == len(arrived)


def test_a_run_in_a_bucket_is_exported_from_there(run: str, bucket: str, tmp_path: Path) -> None:
    fsspec.filesystem("s3").put(f"{run}/", f"{bucket}/run/", recursive=True)
    export(finished_checkpoint(f"{bucket}/run", "sft"), str(tmp_path / "out"), "nanochat")
    assert read_nanochat(str(tmp_path / "out"))[2]["step"] == 12


def test_publishing_needs_a_name_and_a_token(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="hf://USER/NAME"):
        publish(finished_checkpoint(run, "sft"), "hf://just-a-name")
    with pytest.raises(StorageError, match="set HF_TOKEN"):
        publish(finished_checkpoint(run, "sft"), "hf://ada/model")


def test_a_hub_that_cannot_be_reached_is_told_in_one_sentence(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_token")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(StorageError, match="Could not write to hf://ada/model: ") as error:
        publish(finished_checkpoint(run, "sft"), "hf://ada/model")
    assert "\n" not in str(error.value)
    assert "hf_not_a_real_token" not in str(error.value)
