"""All-or-nothing save and load of a policy and of everything that resuming needs.

A folder holds `weights.safetensors`, with training also `training.pt` (optimizer, RNG, data
position), and last `meta.json`, which lists size and CRC-32 of the others: a folder without a
`meta.json` that fits is not a checkpoint. It is written aside, the sizes are looked at, and then it
is moved into place, so a full disk or a killed process leaves what stood there before as it was.

Works on any fsspec path; on a bucket, where nothing can be moved, `meta.json` is the commit.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zlib
from contextlib import suppress
from typing import Any

import fsspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from aquarl.errors import CheckpointError
from aquarl.model.gpt import GPT
from aquarl.model.shape import Shape
from aquarl.storage import get, put_together

ANOTHER = "Delete that folder; the run resumes from the checkpoint before it."


def save_checkpoint(
    folder: str,
    model: GPT,
    *,
    stage: str,
    step: int,
    tokenizer_fingerprint: str,
    training: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint, or change nothing.

    Args:
        folder: Where it shall stand, for example `RUN/checkpoints/sft/step_000400`.
        model: Its weights are written in fp32.
        stage, step: What made it, and after how many steps.
        tokenizer_fingerprint: `Tokenizer.fingerprint`; loading checks it.
        training: Optimizer state, RNG and position: tensors and plain values only, so that it
            loads without executing anything.
        facts: JSON-able values to keep beside it.

    Raises:
        StorageError: The place is full, away or forbidden. What stood there stands.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in named(model).items()}
    files = {"weights.safetensors": save_tensors(weights)}
    if training is not None:
        buffer = io.BytesIO()
        torch.save(training, buffer)
        files["training.pt"] = buffer.getvalue()
    meta = {
        "stage": stage,
        "step": step,
        "shape": model.shape.as_dict(),
        "tokenizer": tokenizer_fingerprint,
        "facts": facts or {},
        "files": {
            name: {"size": len(body), "crc32": zlib.crc32(body)} for name, body in files.items()
        },
    }
    meta["crc32"] = _sum_of(meta)
    files["meta.json"] = json.dumps(meta, indent=1).encode()  # last: it is what counts
    put_together(folder, files)


def _sum_of(meta: dict[str, Any]) -> int:
    """Return the CRC-32 of everything in a meta.json but itself."""
    rest = json.loads(json.dumps({key: meta[key] for key in meta if key != "crc32"}))
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def named(model: GPT) -> dict[str, torch.Tensor]:
    """Return the parameters by name, in the order in which they are sent and saved."""
    return dict(model.state_dict())


def read_meta(folder: str) -> dict[str, Any]:
    """Return `meta.json` of a checkpoint, whatever became of its other files.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        return _meta(folder)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint in {folder}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"The meta.json in {folder} is damaged ({error}). {ANOTHER}"
        ) from error


def check_checkpoint(folder: str) -> None:
    """Read all files of a checkpoint. Raises: CheckpointError, if one is missing or altered."""
    meta = read_meta(folder)
    for name in meta["files"]:
        _file(folder, meta, name)


def load_model(folder: str, tokenizer_fingerprint: str | None = None) -> GPT:
    """Return the policy of a checkpoint, on the CPU, in fp32.

    Raises:
        CheckpointError: It is missing or damaged, or belongs to another vocabulary.
    """
    meta = read_meta(folder)
    if tokenizer_fingerprint not in (None, meta["tokenizer"]):
        raise CheckpointError(
            f"{folder} was trained with another vocabulary (fingerprint {meta['tokenizer']}, "
            f"here {tokenizer_fingerprint}), so its token ids mean other text. Use the run "
            "directory that it came from, or train again from `aquarl base`."
        )
    try:
        model = GPT(Shape(**meta["shape"]))
        model.load_state_dict(load_tensors(_file(folder, meta, "weights.safetensors")))
    except (TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"The weights in {folder} do not have the shape its meta.json names ({error}). "
            f"{ANOTHER}"
        ) from error
    return model


def load_training(folder: str) -> dict[str, Any]:
    """Return what `save_checkpoint` was given as `training`.

    Raises:
        CheckpointError: It is missing or damaged, was saved without, or asks for code to be run.
    """
    meta = read_meta(folder)
    if "training.pt" not in meta["files"]:
        raise CheckpointError(
            f"{folder} holds a policy but not the state to go on training it. "
            "Start its stage anew, or from an earlier checkpoint."
        )
    try:
        # Optimizers move their numbers to where their parameters are.
        loaded: dict[str, Any] = torch.load(
            io.BytesIO(_file(folder, meta, "training.pt")), map_location="cpu", weights_only=True
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"training.pt in {folder} holds more than tensors and numbers, as no checkpoint of "
            "aquarl does: it could run any code, so it is not loaded. Find out who wrote it; to go "
            "on without it, delete that stage's folder and start the stage anew."
        ) from error
    return loaded


def _meta(folder: str) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads(get(f"{folder.rstrip('/')}/meta.json"))
    if meta["crc32"] != _sum_of(meta):
        raise ValueError("its checksum differs")
    return meta


def _file(folder: str, meta: dict[str, Any], name: str) -> bytes:
    """Return a file's content, after checking it. Raises: CheckpointError."""
    try:
        body = get(f"{folder.rstrip('/')}/{name}")
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} is missing from {folder}. {ANOTHER}") from error
    expected = meta["files"][name]
    if len(body) != expected["size"] or zlib.crc32(body) != expected["crc32"]:
        raise CheckpointError(
            f"{name} in {folder} is not what was saved: {len(body)} bytes of "
            f"{expected['size']}, or altered ones. {ANOTHER}"
        )
    return body


def checkpoints(stage_dir: str) -> list[str]:
    """Return the folders `step_NNNNNN` of a stage, oldest first, checked or not."""
    fs, path = fsspec.url_to_fs(stage_dir)
    if not fs.isdir(path):
        return []
    fs.invalidate_cache(path)
    names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)]
    steps = sorted(int(name[5:]) for name in names if re.fullmatch(r"step_\d{6,}", name))
    return [f"{stage_dir}/step_{step:06d}" for step in steps]


def latest_checkpoint(stage_dir: str) -> str | None:
    """Return the newest whole checkpoint of a stage, or None if it has none.

    One that is damaged is passed over: it was never finished, and the one before it is whole.
    """
    for folder in reversed(checkpoints(stage_dir)):
        try:
            check_checkpoint(folder)
        except CheckpointError:
            continue
        return folder
    return None


def newest_facts(stage_dir: str) -> dict[str, Any]:
    """Return what `save_checkpoint` was last given as `facts`, without looking at the rest."""
    for folder in reversed(checkpoints(stage_dir)):
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # unfinished or damaged
            return dict(_meta(folder)["facts"])
    return {}


def stage_folder(run_dir: str, stage: str) -> str:
    return f"{run_dir}/checkpoints/{stage}"


def checkpoint_folder(run_dir: str, stage: str, step: int) -> str:
    return f"{stage_folder(run_dir, stage)}/step_{step:06d}"
