"""Secrets to put into the environment of what a test starts, and a search for where they end up."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

SECRETS = {
    "WANDB_API_KEY": "5ec4e7" + "0" * 33 + "1",
    "HF_TOKEN": "hf_5ec4e7abcdefghijklmnopqrstuvwx",
    "AWS_SECRET_ACCESS_KEY": "5ec4e7/AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    "GOOGLE_APPLICATION_CREDENTIALS_JSON": '{"private_key": "5ec4e7-google"}',
    "RAY_AUTH_TOKEN": "5ec4e7abcdef0123" * 4,
}
MARK = b"5ec4e7"
"""Stands in every secret and nowhere else."""


def holding_a_secret(folder: Path) -> set[str]:
    """Return the files below a folder that hold one, but for checkouts that Ray was sent: this."""
    found = set()
    for file in folder.rglob("*"):
        if "runtime_resources" in file.parts:
            continue
        with suppress(OSError):
            if file.is_file() and MARK in file.read_bytes():
                found.add(str(file))
    return found
