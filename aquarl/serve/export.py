"""A checkpoint in, a folder that others can load out: checked, then placed.

Files are made by `serve.hf` or `serve.nanochat`, written aside, loaded again by the code that will
load them there (transformers' own class for Hugging Face), and their logits compared with the
checkpoint's. Only then are they put where the user asked, which may be a bucket or the hub.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import fsspec
import torch
from torch import Tensor

from aquarl.data.tokenizer import Tokenizer
from aquarl.errors import AquarlError, CheckpointError, ConfigError, StorageError
from aquarl.model.checkpoint import load_model, read_meta
from aquarl.model.gpt import GPT
from aquarl.records import Conversation, Message
from aquarl.serve.hf import hf_files
from aquarl.serve.nanochat import nanochat_files, read_nanochat
from aquarl.storage import get, put_together

Format = Literal["hf", "nanochat"]

LOGIT_TOLERANCE = 1e-4
"""Largest difference of a logit between the checkpoint and what was written, both fp32."""

SAMPLE = Conversation(
    (
        Message("system", "Answer in one line."),
        Message("user", "  If 3x + 7 = 2026, what is x?\n\nOptions: A) 673 B) 1,024½ 🙂 "),
        Message("assistant", "3x = 2019, so x = 673.\nAnswer: A"),
        Message("user", "Et en français ?"),
    )
)
"""What both tokenizers must render alike: digits, newlines, symbols, a system message, turns."""


def export(checkpoint: str, out: str, format: Format = "hf") -> str:
    """Write a checkpoint in another format, or change nothing.

    Args:
        checkpoint: `RUN/checkpoints/STAGE/step_NNNNNN`. The tokenizer is RUN's, and RUN's
            `report.json`, if there is one, fills the model card.
        out: Empty or new folder, local or any fsspec address.
        format: "hf" for transformers and vLLM, "nanochat" for nanochat of October 2025.

    Returns:
        One sentence: what stands where, and how far its logits are from the checkpoint's.

    Raises:
        CheckpointError: There is nothing to export, or what was written does not compute the same.
        ConfigError: The format is unknown, or `out` is on the hub.
        StorageError: `out` holds something, or cannot be written to.
    """
    if format not in get_args(Format):
        raise ConfigError(
            f"There is no format {format!r}. Write hf (transformers, vLLM) or nanochat."
        )
    if out.startswith("hf://"):
        raise ConfigError(f"{out} is on the hub; sending there is `aquarl publish {out}`.")
    out = out.rstrip("/") or out
    _refuse_occupied(out)
    files, what = _checked_files(checkpoint, format, aside=_folder_above(out))
    with _storing(out):
        put_together(out, files)
    return f"{what} It is in {out}."


def publish(checkpoint: str, target: str) -> str:
    """Send a checkpoint, in Hugging Face format, to the hub or a bucket.

    On the hub all files arrive in one commit; what was there before stays in its history.

    Args:
        checkpoint: As for `export`.
        target: `hf://USER/NAME`, or an address for `export`.

    Returns:
        One sentence, as `export` does.

    Raises:
        ConfigError: The target is no name of a model on the hub.
        StorageError: There is no token, or the place cannot be reached or written to.
        CheckpointError: As for `export`.
    """
    if not target.startswith("hf://"):
        return export(checkpoint, target, "hf")
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    name = target.removeprefix("hf://").strip("/")
    if name.count("/") != 1:
        raise ConfigError(
            f"{target} does not name a model on the hub. Write hf://USER/NAME, "
            "for example hf://ada/aquarl-d20."
        )
    token = get_token()
    if not token:
        raise StorageError(
            f"There is no token for the Hugging Face hub, so nothing can be sent to {target}. "
            "Make one with write access at huggingface.co/settings/tokens and set HF_TOKEN to it."
        )
    files, what = _checked_files(checkpoint, "hf", aside=None)
    with _storing(target):
        hub = HfApi(token=token)
        hub.create_repo(name, exist_ok=True)
        hub.create_commit(
            name,
            [CommitOperationAdd(path_in_repo=path, path_or_fileobj=files[path]) for path in files],
            commit_message=what,
        )
    return f"{what} It is at {target}."


def _checked_files(
    checkpoint: str, format: Format, aside: Path | None
) -> tuple[dict[str, bytes], str]:
    """Return the files to place, after loading a copy of them, and a sentence about them."""
    run_dir, _, stage, _ = checkpoint.rsplit("/", 3)
    tokenizer = Tokenizer.load(f"{run_dir}/tokenizer")
    model = load_model(checkpoint, tokenizer.fingerprint).eval()
    step = read_meta(checkpoint)["step"]
    if format == "hf":
        run_name = run_dir.rstrip("/").rsplit("/", 1)[-1]
        title, figures = f"aquarl {run_name}: {stage}, step {step}", _figures(run_dir, stage, step)
        files = hf_files(model, tokenizer, title=title, figures=figures)
    else:
        files = nanochat_files(model, tokenizer, step=step)
    check = _difference_in_transformers if format == "hf" else _difference_in_nanochat
    with tempfile.TemporaryDirectory(dir=aside, prefix=".aquarl-export-") as folder:
        with _storing(folder):
            for name, body in files.items():
                Path(folder, name).write_bytes(body)
        difference = check(folder, model, tokenizer)
    if not difference < LOGIT_TOLERANCE:  # also true of nan
        raise CheckpointError(
            f"What was written for {checkpoint} computes other logits (by up to {difference:.1e}, "
            f"allowed {LOGIT_TOLERANCE:.0e}), so it was not put in place. If the weights hold nan, "
            "export an earlier stage; else this is a bug in aquarl: please report it."
        )
    return files, (
        f"{stage} of step {step} in {format} format, loaded again: its logits are within "
        f"{difference:.1e} of the checkpoint's."
    )


@torch.inference_mode()
def _difference_in_transformers(folder: str, model: GPT, tokenizer: Tokenizer) -> float:
    """Return the largest difference of a logit in transformers' own model; check ids too."""
    try:
        from transformers import AutoTokenizer, NanoChatForCausalLM
    except ImportError as error:
        raise AquarlError(
            "Hugging Face format is checked with transformers before it is handed out, and "
            "transformers 5 or newer is not installed. Type: pip install -U transformers"
        ) from error
    messages = [{"role": m.role, "content": m.content} for m in SAMPLE.messages]
    with _quiet_transformers():
        their_tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        rendered = their_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        theirs = NanoChatForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()
    if rendered != tokenizer.render_prompt(SAMPLE):
        raise CheckpointError(
            "The exported tokenizer gives other ids than the run's own, so it was not put in "
            "place. This is a bug in aquarl: please report it with the run's tokenizer folder."
        )
    ids_BT = _some_ids(model)
    return _largest_difference(theirs(ids_BT).logits, model.logits(model(ids_BT)))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hold back progress bars and warnings (SAMPLE may be longer than a small context)."""
    from transformers.utils import logging

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()


@torch.inference_mode()
def _difference_in_nanochat(folder: str, model: GPT, tokenizer: Tokenizer) -> float:
    """Return the largest difference of a logit after reading the files back; check ids too."""
    theirs, their_tokenizer, _ = read_nanochat(folder)
    assert their_tokenizer.fingerprint == tokenizer.fingerprint
    ids_BT = _some_ids(model)
    return _largest_difference(theirs.logits(theirs(ids_BT)), model.logits(model(ids_BT)))


def _some_ids(model: GPT) -> Tensor:
    """Return (2, T) ids from all over the vocabulary, T as long as a row may be, up to 128."""
    size = (2, min(model.shape.context, 128))
    return torch.randint(model.shape.vocab, size, generator=torch.Generator().manual_seed(0))


def _largest_difference(a_BTV: Tensor, b_BTV: Tensor) -> float:
    return float((a_BTV.float() - b_BTV.float()).abs().max())


def _figures(run_dir: str, stage: str, step: int) -> dict[str, Any]:
    """Return what `report.json` says was measured of a stage: its split, and training's end.

    Nothing, where it tells of a policy that stood there before this one.
    """
    report = _json(f"{run_dir}/report.json")
    evaluation, about = report.get("evaluation", {}), report.get("stages", {}).get(stage, {})
    measured = evaluation.get("stages", {}).get(stage, {})
    told_of = about.get("finished"), measured.get("checkpoint", {}).get("step", step)
    if not report or told_of != (_json(f"{run_dir}/results/{stage}.json").get("finished"), step):
        return {}
    return {evaluation.get("split", "evaluation"): measured, "training": about.get("final", {})}


def _json(path: str) -> dict[str, Any]:
    """Return what a file of the run says, {} where there is none."""
    try:
        found = json.loads(get(path))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}), so the model card has no figures to show. Delete that "
            "file, or run `aquarl report` again."
        ) from error
    return found


def _refuse_occupied(out: str) -> None:
    with _storing(out):
        fs, path = fsspec.url_to_fs(out)
        is_occupied = bool(fs.ls(path)) if fs.isdir(path) else fs.exists(path)
    if is_occupied:
        raise StorageError(
            f"{out} already holds something, and an export does not replace what it did not make. "
            "Name a new folder, or delete that one first."
        )


def _folder_above(out: str) -> Path | None:
    """Return the local folder that shall hold `out`, made if need be; None on a bucket."""
    fs, path = fsspec.url_to_fs(out)
    if "file" not in fs.protocol:
        return None
    above = Path(path).parent
    with _storing(out):
        above.mkdir(parents=True, exist_ok=True)
    return above


@contextmanager
def _storing(place: str) -> Iterator[None]:
    """Turn whatever storage raises, disk, bucket or hub, into one sentence that names the place."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, StorageError) and error.__cause__ else error
        why = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        raise StorageError(
            f"Could not write to {place}: {' '.join(why.split()).rstrip('.')}. What stood there is "
            "as it was. Check the address, the right to write there and the free space."
        ) from error
