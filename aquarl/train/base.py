"""The base stage: plain text in, rows of neighbouring tokens out.

A row may hold the end of one document and the start of the next, and attention crosses the border:
<|bos|> tells the model. Documents are encoded once, into a memory-mapped file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from aquarl.config import Config
from aquarl.data.batches import RowSource, TokenFile, write_tokens
from aquarl.data.tokenizer import Tokenizer
from aquarl.tasks.catalog import corpus_documents


def encode_corpus(config: Config, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokens of both splits into a folder, unless they stand there; what a run that was
    cut off has encoded there is not encoded again.

    Raises:
        DataError: The corpus is missing or broken.
        StorageError: The disk is full.
    """
    for split in ("train", "validation"):
        path = token_path(config, tokenizer, folder, split)
        if not path.exists():
            documents = corpus_documents(config.data, config.run.seed, split)
            write_tokens(documents, tokenizer, path, at_most=tokens_wanted(config, split))


def rows(config: Config, tokenizer: Tokenizer, folder: Path) -> tuple[RowSource, RowSource]:
    """Return training and validation rows. `encode_corpus` was called before, on this machine."""
    context, seed = config.model.context, config.run.seed
    train, validation = (
        TokenFile(token_path(config, tokenizer, folder, split), tokenizer.vocab_size, context, seed)
        for split in ("train", "validation")
    )
    return train, validation


def tokens_wanted(config: Config, split: str) -> int:
    """Return how many tokens a split's file holds, if the corpus has so many."""
    base, context = config.base, config.model.context
    if split == "train":
        return base.steps * base.batch_tokens + context + 1
    return (base.eval_rows + 1) * context + 1


def token_path(config: Config, tokenizer: Tokenizer, folder: Path, split: str) -> Path:
    """Return a file name that tells vocabulary, data and size: other settings get another file."""
    data = f"{config.run.seed} {config.data.model_dump_json()}"
    told = tokenizer.fingerprint, hashlib.sha256(data.encode()).hexdigest()[:12]
    return folder / f"{split}-{'-'.join(told)}-{tokens_wanted(config, split)}.bin"
