"""nanochat's files become ours and ours become nanochat's; no pickle is ever executed."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch

from aquarl.cli import main
from aquarl.data.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from aquarl.errors import AquarlError, CheckpointError
from aquarl.model.checkpoint import load_model, read_meta
from aquarl.model.gpt import GPT
from aquarl.model.shape import Shape
from aquarl.serve.nanochat import (
    import_nanochat,
    nanochat_files,
    read_nanochat,
    read_tokenizer,
)
from tests.conftest import assert_same, weights
from tests.fakes import byte_tokenizer

TOKENIZER = byte_tokenizer(b"th", b"the")


def random_model(vocab: int = TOKENIZER.vocab_size) -> GPT:
    model = GPT(Shape(vocab, layers=2, width=32, heads=4, kv_heads=2, context=16))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(generator=generator)
    return model


def write_as_nanochat(folder: Path, model: GPT, step: int = 650, *, compiled: bool = True) -> None:
    """Write a folder with nanochat's own calls: torch.save, json.dump, pickle.dump of tiktoken."""
    folder.mkdir(exist_ok=True)
    prefix = "_orig_mod." if compiled else ""
    state = {prefix + name: weight.clone() for name, weight in model.state_dict().items()}
    wte = f"{prefix}transformer.wte.weight"
    state[wte] = state[wte].to(torch.bfloat16)
    torch.save(state, folder / f"model_{step:06d}.pt")
    shape = model.shape
    meta = {
        "step": step,
        "val_loss": 1.25,
        "model_config": {
            "sequence_len": shape.context,
            "vocab_size": shape.vocab,
            "n_layer": shape.layers,
            "n_head": shape.heads,
            "n_kv_head": shape.kv_heads,
            "n_embd": shape.width,
        },
    }
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta, indent=2))
    encoding = tiktoken.Encoding(
        name="rustbpe",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=TOKENIZER.ranks,
        special_tokens=TOKENIZER.special_tokens,
    )
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_as_nanochat(tmp_path / "theirs", random_model())
    return tmp_path / "theirs"


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def one_sentence(error: pytest.ExceptionInfo[AquarlError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text and len(text) < 500, text
    for word in words:
        assert word in text, text


def test_an_imported_checkpoint_is_nanochats_model(folder: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    target = import_nanochat(str(folder), run, "sft")
    assert target == f"{run}/checkpoints/sft/step_000650"
    tokenizer = Tokenizer.load(f"{run}/tokenizer")
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    model, expected = load_model(target, tokenizer.fingerprint), random_model()
    assert model.shape == expected.shape
    for name, weight in expected.state_dict().items():
        rounded = weight.bfloat16().float() if "wte" in name else weight
        torch.testing.assert_close(model.state_dict()[name], rounded, rtol=0, atol=0)
    meta = read_meta(target)
    assert (meta["stage"], meta["step"]) == ("sft", 650)


def test_the_newest_step_is_read_unless_another_is_named(folder: Path) -> None:
    write_as_nanochat(folder, random_model(), step=700, compiled=False)
    assert read_nanochat(str(folder))[2]["step"] == 700
    assert read_nanochat(str(folder), step=650)[2]["step"] == 650


def test_what_is_written_can_be_loaded_as_nanochat_does(tmp_path: Path) -> None:
    model = random_model()
    for name, body in nanochat_files(model, TOKENIZER, step=7).items():
        (tmp_path / name).write_bytes(body)
    state = torch.load(tmp_path / "model_000007.pt", weights_only=True)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())
    with (tmp_path / "tokenizer.pkl").open("rb") as file:
        encoding = pickle.load(file)  # our own file, just written
    text = "the thesis costs 1234 <|bos|>\n"
    assert encoding.encode_ordinary(text) == TOKENIZER.encode(text)
    assert encoding.encode_single_token("<|bos|>") == TOKENIZER.bos
    token_bytes = torch.load(tmp_path / "token_bytes.pt", weights_only=True)
    assert token_bytes.tolist() == TOKENIZER.bytes_per_token
    again, tokenizer, meta = read_nanochat(str(tmp_path))
    assert again.shape == model.shape and meta["step"] == 7
    assert tokenizer.fingerprint == TOKENIZER.fingerprint


class Calls:
    """Pickles into a call of a function, as every attack of this kind does."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, Any]:
        return self.call


def pickled_encoding(
    *, pat_str: Any = SPLIT_PATTERN, mergeable_ranks: Any = None, special_tokens: Any = None
) -> bytes:
    """Return the pickle of a tiktoken.Encoding whose fields were never checked by tiktoken."""
    encoding: Any = object.__new__(tiktoken.Encoding)
    encoding.name, encoding._pat_str = "rustbpe", pat_str
    encoding._mergeable_ranks = mergeable_ranks or TOKENIZER.ranks
    encoding._special_tokens = special_tokens or TOKENIZER.special_tokens
    return pickle.dumps(encoding)


def hostile_pickles(mark: Path) -> dict[str, bytes]:
    touch = f"touch {mark}"
    python = f"open({str(mark)!r}, 'w').close()"
    encoding = b"\x80\x04\x8c\rtiktoken.core\x8c\x08Encoding\x93"
    return {
        "os.system": pickle.dumps(Calls(os.system, touch)),
        "os.system, protocol 0": f"cposix\nsystem\n(S'{touch}'\ntR.".encode(),
        "builtins.eval": pickle.dumps(Calls(eval, python)),
        "builtins.exec": pickle.dumps(Calls(exec, python)),
        "getattr": pickle.dumps(Calls(getattr, TOKENIZER.ranks, "clear")),
        "nested in the vocabulary": pickled_encoding(
            special_tokens={**TOKENIZER.special_tokens, "x": Calls(os.system, touch)}
        ),
        "a call in a list": pickle.dumps([1, {"a": (Calls(os.system, touch),)}]),
        "a method of the admitted class": (
            b"\x80\x04\x8c\rtiktoken.core\x8c\x15Encoding.__setstate__\x93)R."
        ),
        "another name of its module": (b"\x80\x04\x8c\rtiktoken.core\x8c\x02os\x93)R."),
        "instance opcode": f"(S'{touch}'\niposix\nsystem\n.".encode(),
        "extension registry": b"\x80\x02\x82\x01)R.",
        "persistent id": b"Psome-id\n.",
        "a call of the admitted class": encoding + b"\x8c\x01x\x85R.",
        "state set on the class itself": encoding + b"}\x8c\x05state}sb.",
        "a huge memo": b"\x80\x04Nr\xff\xff\xff\x7f.",
    }


NAMES = list(hostile_pickles(Path("mark")))


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_tokenizer_is_refused_and_nothing_runs(
    name: str, folder: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "it-ran"
    (folder / "tokenizer.pkl").write_bytes(hostile_pickles(mark)[name])
    before = files_below(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.pkl") as error:
        import_nanochat(str(folder), str(tmp_path / "run"))
    one_sentence(error)
    assert not mark.exists()
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "builtins.exec"])
def test_these_pickles_would_run_if_they_were_loaded(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    pickle.loads(hostile_pickles(mark)[name])
    assert mark.exists()


def test_hostile_weights_are_refused_and_nothing_runs(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    state = random_model().state_dict()
    torch.save({**state, "x": Calls(os.system, f"touch {mark}")}, folder / "model_000650.pt")
    with pytest.raises(CheckpointError, match="nothing in it was executed") as error:
        read_nanochat(str(folder))
    one_sentence(error, "model_000650.pt")
    assert not mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", ["model_000650.pt", "tokenizer.pkl", "meta_000650.json"])
def test_a_truncated_file_is_named(name: str, share: float, folder: Path, tmp_path: Path) -> None:
    body = (folder / name).read_bytes()
    (folder / name).write_bytes(body[: int(len(body) * share)])
    with pytest.raises(CheckpointError) as error:
        import_nanochat(str(folder), str(tmp_path / "run"))
    one_sentence(error, name, "Copy")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["model_000650.pt", "tokenizer.pkl", "meta_000650.json"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError) as error:
        read_nanochat(str(folder), step=650)
    one_sentence(error, name, "no")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"no model_NNNNNN\.pt") as error:
            read_nanochat(str(place))
        one_sentence(error, str(place))


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    write_as_nanochat(folder, random_model(vocab=300))
    with pytest.raises(CheckpointError) as error:
        read_nanochat(str(folder))
    one_sentence(error, "267", "300", "tokenizer.pkl")


def test_a_later_nanochat_is_refused_by_the_name_of_its_weights(folder: Path) -> None:
    state = random_model().state_dict() | {"resid_lambdas": torch.ones(2)}
    torch.save(state, folder / "model_000650.pt")
    with pytest.raises(CheckpointError) as error:
        read_nanochat(str(folder))
    one_sentence(error, "resid_lambdas", "October 2025")


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    state = random_model().state_dict()
    torch.save(state | {"lm_head.weight": torch.ones(3, 32)}, folder / "model_000650.pt")
    with pytest.raises(CheckpointError) as error:
        read_nanochat(str(folder))
    one_sentence(error, "lm_head.weight", "(3, 32)", "(267, 32)")
    del state["lm_head.weight"]
    torch.save(state, folder / "model_000650.pt")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight of shape None"):
        read_nanochat(str(folder))


@pytest.mark.parametrize(
    "change", [{"n_head": 0}, {"n_head": 3}, {"n_kv_head": 3}, {"n_layer": "2"}, {"n_layer": 9**9}]
)
def test_a_meta_file_that_describes_no_model_is_refused(
    change: dict[str, Any], folder: Path
) -> None:
    path = folder / "meta_000650.json"
    meta = json.loads(path.read_text())
    meta["model_config"] |= change
    path.write_text(json.dumps(meta))
    with pytest.raises(CheckpointError) as error:
        read_nanochat(str(folder))
    one_sentence(error, "meta")


UNUSABLE = {
    # How tiktoken pickles an encoding of its own: by name, to be downloaded.
    "by name": b"\x80\x04\x8c\rtiktoken.core\x8c\x08Encoding\x93)\x81\x8c\x04gpt2b.",
    "not an encoding": pickle.dumps({"a": 1}),
    "too few bytes": pickled_encoding(mergeable_ranks={b"a": 0}, special_tokens={"<|bos|>": 1}),
    "text for bytes": pickled_encoding(mergeable_ranks={chr(i): i for i in range(256)}),
    "gap in the ids": pickled_encoding(
        special_tokens={name: 1_000 + i for i, name in enumerate(SPECIAL_TOKENS)}
    ),
    "other special tokens": pickled_encoding(special_tokens={"<|endoftext|>": 258}),
    "pattern is no text": pickled_encoding(pat_str=7),
    "pattern is no pattern": pickled_encoding(pat_str="("),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_pickle_without_a_usable_vocabulary_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.pkl").write_bytes(UNUSABLE[name])
    with pytest.raises(CheckpointError) as error:
        read_tokenizer(str(tmp_path))
    one_sentence(error, "tokenizer.pkl", "Copy the one")


def test_an_import_never_touches_what_a_run_holds(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    import_nanochat(str(folder), str(run), "sft")
    before = files_below(run)
    with pytest.raises(CheckpointError, match="already holds checkpoints"):
        import_nanochat(str(folder), str(run), "sft")
    assert files_below(run) == before

    other = tmp_path / "other"
    byte_tokenizer().save(str(other / "tokenizer"))
    before = files_below(other)
    with pytest.raises(CheckpointError, match="vocabulary of its own"):
        import_nanochat(str(folder), str(other), "base")
    assert files_below(other) == before


def test_a_second_stage_joins_the_first(folder: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    import_nanochat(str(folder), run, "base")
    assert import_nanochat(str(folder), run, "sft").endswith("checkpoints/sft/step_000650")


@pytest.mark.slow
def test_what_was_imported_is_trained_on(finished_run: Path, tiny: str, tmp_path: Path) -> None:
    there, run = str(tmp_path / "nanochat"), tmp_path / "run"
    nanochat = ["--format", "nanochat", "--stage", "sft"]
    assert main(["export", there, *nanochat, f"run.dir={finished_run}"]) == 0
    assert main(["import-nanochat", there, f"run.dir={run}"]) == 0
    assert main(["pipeline", "--config", tiny, f"run.dir={run}"]) == 0
    assert_same(weights(run), weights(finished_run))
    assert main(["report", f"run.dir={run}"]) == 0
    page = (run / "report.md").read_text()
    assert re.search(r"^\| mid (\| - ){5}", page, re.MULTILINE), "none of it is known"
