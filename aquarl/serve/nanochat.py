"""nanochat's own checkpoint files in and out: what was trained there goes on here, and back.

Comes in: a folder with `model_NNNNNN.pt`, `meta_NNNNNN.json` and `tokenizer.pkl` as nanochat of
October 2025 writes them. Goes out: our tokenizer and checkpoint in a run directory, which every
stage reads next; or, the other way, the bytes of those files for `serve.export`.

Two of them are pickles, and a pickle can run any code. None is executed here: weights are read by
torch's weights-only loader, and the tokenizer by an unpickler that knows one name,
`tiktoken.core.Encoding`, and answers it with an inert class.

Dropped: optimizer state (`optim_*.pt`), which nanochat shards by its own ranks.

Source: nanochat/checkpoint_manager.py and nanochat/tokenizer.py, October 2025.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import tiktoken
import torch
from torch import Tensor

from aquarl.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from aquarl.errors import CheckpointError, StorageError
from aquarl.model.checkpoint import checkpoint_folder, checkpoints, save_checkpoint
from aquarl.model.gpt import GPT
from aquarl.model.shape import Shape

MODEL_CONFIG = {
    "sequence_len": "context",
    "vocab_size": "vocab",
    "n_layer": "layers",
    "n_head": "heads",
    "n_kv_head": "kv_heads",
    "n_embd": "width",
}
"""nanochat's name of each number of `Shape`."""


def import_nanochat(folder: str, run_dir: str, stage: str = "sft", step: int | None = None) -> str:
    """Take a nanochat checkpoint into a run directory and return the checkpoint's new folder.

    Args:
        folder: Where nanochat's files lie, tokenizer.pkl included; any fsspec path.
        run_dir: Its `tokenizer/` and `checkpoints/<stage>/` are written; nothing is overwritten.
        stage: What the checkpoint shall count as: "base", "mid", "sft" or "rl".
        step: Which `model_NNNNNN.pt`; the newest without it.

    Raises:
        CheckpointError: A file is missing, damaged, of another model, or could run code; or the
            run directory holds this stage, or another vocabulary, already.
        StorageError: A place cannot be reached, or not written to.
    """
    stage_dir = f"{run_dir}/checkpoints/{stage}"
    if checkpoints(stage_dir):
        raise CheckpointError(
            f"{stage_dir} already holds checkpoints, and an imported one could hide them. "
            "Import into a new run: add run.dir=runs/imported."
        )
    model, tokenizer, meta = read_nanochat(folder, step)
    target = checkpoint_folder(run_dir, stage, meta["step"])
    _save_tokenizer(tokenizer, run_dir)
    save_checkpoint(
        target,
        model,
        stage=stage,
        step=meta["step"],
        tokenizer_fingerprint=tokenizer.fingerprint,
        facts={"imported_from": folder},
    )
    return target


def _save_tokenizer(tokenizer: Tokenizer, run_dir: str) -> None:
    fs, path = fsspec.url_to_fs(f"{run_dir}/tokenizer")
    if not fs.exists(f"{path}/tokenizer.json"):
        tokenizer.save(f"{run_dir}/tokenizer")
    elif Tokenizer.load(f"{run_dir}/tokenizer").fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"{run_dir} has a vocabulary of its own, and the imported model speaks another. "
            "Import into a new run: add run.dir=runs/imported."
        )


def read_nanochat(folder: str, step: int | None = None) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Return model (fp32, CPU), tokenizer and meta of a nanochat folder. Executes nothing.

    Raises:
        CheckpointError: A file is missing, damaged, of another model, or could run code.
    """
    step = _newest_step(folder) if step is None else step
    meta = _read_meta(folder, step)
    shape = Shape(**{ours: meta["model_config"][theirs] for theirs, ours in MODEL_CONFIG.items()})
    tokenizer = read_tokenizer(folder)
    if tokenizer.vocab_size != shape.vocab:
        raise CheckpointError(
            f"tokenizer.pkl in {folder} has {tokenizer.vocab_size} tokens, but the model has "
            f"{shape.vocab}, so they are not of one training. Copy the tokenizer.pkl that this "
            "model was trained with beside it."
        )
    name = f"model_{step:06d}.pt"
    state = _read_weights(folder, name)
    _refuse_other_model(state, shape, f"{name} in {folder}")
    model = GPT(shape)
    model.load_state_dict(state)
    return model, tokenizer, meta


def nanochat_files(model: GPT, tokenizer: Tokenizer, *, step: int) -> dict[str, bytes]:
    """Return the files of a nanochat folder, by name, that `read_nanochat` and nanochat read.

    Weights are fp32: nanochat loads them over its bf16 embedding and rounds at its own autocast.
    """
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    encoding = tiktoken.Encoding(
        "rustbpe",
        pat_str=tokenizer.pattern,
        mergeable_ranks=tokenizer.ranks,
        special_tokens=tokenizer.special_tokens,
    )
    numbers = model.shape.as_dict()
    meta = {"step": step, "model_config": {name: numbers[o] for name, o in MODEL_CONFIG.items()}}
    return {
        "tokenizer.pkl": pickle.dumps(encoding),
        "token_bytes.pt": _saved(torch.tensor(tokenizer.bytes_per_token, dtype=torch.int32)),
        f"meta_{step:06d}.json": json.dumps(meta, indent=2).encode(),
        f"model_{step:06d}.pt": _saved(state),  # last: nanochat looks for the newest of these
    }


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _newest_step(folder: str) -> int:
    with _reaching(folder):
        fs, path = fsspec.url_to_fs(folder)
        found = fs.ls(path, detail=False) if fs.isdir(path) else []
    names = [str(entry).rsplit("/", 1)[-1] for entry in found]
    steps = [int(m[1]) for name in names if (m := re.fullmatch(r"model_(\d{6,})\.pt", name))]
    if not steps:
        raise CheckpointError(
            f"There is no model_NNNNNN.pt in {folder}. Name the folder of one nanochat model, "
            "for example ~/.cache/nanochat/chatsft_checkpoints/d20."
        )
    return max(steps)


def _read_file(folder: str, name: str) -> bytes:
    try:
        with _reaching(folder):
            fs, path = fsspec.url_to_fs(folder)
            body: bytes = fs.cat_file(f"{path}/{name}")
    except FileNotFoundError as error:
        beside = " (nanochat keeps it in ~/.cache/nanochat/tokenizer)" if ".pkl" in name else ""
        raise CheckpointError(
            f"There is no {name} in {folder}. Copy it there from where the model was "
            f"trained{beside}."
        ) from error
    return body


@contextmanager
def _reaching(folder: str) -> Iterator[None]:
    """Turn whatever storage raises into one sentence; a missing file is the caller's to tell."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise StorageError(
            f"Could not read {folder}: {error}. Check the address and the right to read there."
        ) from error


def _read_meta(folder: str, step: int) -> dict[str, Any]:
    name = f"meta_{step:06d}.json"
    try:
        meta: dict[str, Any] = json.loads(_read_file(folder, name))
        numbers = [meta["model_config"][key] for key in MODEL_CONFIG]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{name} in {folder} is not a nanochat meta file ({type(error).__name__}: {error}). "
            "Copy it again from where the model was trained."
        ) from error
    is_whole = all(type(n) is int and n > 0 for n in numbers)
    config = meta["model_config"]
    if (
        not is_whole
        or config["n_embd"] % (2 * config["n_head"])
        or config["n_head"] % config["n_kv_head"]
    ):
        raise CheckpointError(
            f"{name} in {folder} describes no model: {config}. "
            "Copy it again from where the model was trained."
        )
    return meta | {"step": step}


def _read_weights(folder: str, name: str) -> dict[str, Tensor]:
    body = _read_file(folder, name)
    try:
        loaded = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        state = {key.removeprefix("_orig_mod."): value.float() for key, value in loaded.items()}
    except Exception as error:  # a damaged or hostile pickle can raise anything at all
        raise CheckpointError(
            f"{name} in {folder} is damaged, or holds more than plain weights; nothing in it was "
            "executed. Copy it again from where the model was trained."
        ) from error
    return state


def _refuse_other_model(state: dict[str, Tensor], shape: Shape, where: str) -> None:
    layers = len({name.split(".")[2] for name in state if name.startswith("transformer.h.")})
    if layers != shape.layers:
        raise CheckpointError(
            f"{where} has {layers} layers, but its meta file says {shape.layers}. "
            "Copy both again from where the model was trained."
        )
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in GPT(shape).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if unknown := sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            f"{where} has weights named {unknown[0]!r}, which nanochat's model of October 2025 "
            "does not have. aquarl computes that model and no later one; train one of it."
        )
    for name, size in expected.items():
        if found.get(name) != size:
            raise CheckpointError(
                f"{where} has {name} of shape {found.get(name)}, but its meta file asks for "
                f"{size}. Copy both again from where the model was trained."
            )


class _EncodingState:
    """Stands for `tiktoken.Encoding` while unpickling: keeps what it is given, does nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _EncodingUnpickler(pickle._Unpickler):
    """Admits one name. The Python class, as the C one allocates any memo size a pickle asks for."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _EncodingState
        raise pickle.UnpicklingError(f"it asks for {module + '.' + name!r}")


def read_tokenizer(folder: str) -> Tokenizer:
    """Return the tokenizer of a nanochat folder; its pickle is parsed, never executed.

    Raises:
        CheckpointError: tokenizer.pkl is missing, damaged, no tiktoken vocabulary, or asks for
            anything but one.
    """
    body = _read_file(folder, "tokenizer.pkl")
    try:
        encoding = _EncodingUnpickler(io.BytesIO(body)).load()
    except Exception as error:  # a damaged or hostile pickle can raise anything at all
        raise CheckpointError(
            f"tokenizer.pkl in {folder} is damaged, or not a plain tiktoken vocabulary "
            f"({error!s:.99}); nothing in it was executed. Copy it again from where the model was "
            "trained, if you trust that place."
        ) from error
    state: Any = encoding.state if type(encoding) is _EncodingState else None
    if not _is_vocabulary(state):
        raise CheckpointError(
            f"tokenizer.pkl in {folder} does not hold a vocabulary of nanochat: all 256 bytes, "
            f"merges, then special tokens {SPECIAL_TOKENS[0]} to {SPECIAL_TOKENS[-1]}, in one "
            "row of ids. Copy the one that this model was trained with."
        )
    try:
        return Tokenizer(state["mergeable_ranks"], state["pat_str"], state["special_tokens"])
    except ValueError as error:
        raise CheckpointError(
            f"tokenizer.pkl in {folder} splits text by a pattern that is no regular expression "
            f"({error}). Copy the one that this model was trained with."
        ) from error


def _is_vocabulary(state: Any) -> bool:
    try:
        ranks, special = state["mergeable_ranks"], state["special_tokens"]
        ids = sorted([*ranks.values(), *special.values()])
        return (
            isinstance(state["pat_str"], str)
            and all(type(token) is bytes for token in ranks)
            and all(type(name) is str for name in special)
            and all(type(i) is int for i in ids)
            and ids == list(range(len(ids)))
            and max(ranks.values()) < min(special.values())
            and all(bytes([byte]) in ranks for byte in range(256))
            and set(SPECIAL_TOKENS) <= special.keys()
        )
    except (TypeError, KeyError, AttributeError, ValueError):
        return False
