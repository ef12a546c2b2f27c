"""How fast are others on the very work of `aquarl bench`? transformers, TRL and nanochat, in turn.

    python ray_jobs/peers.py [--size d2 d4] [--repeats 5] [--threads 1] [--problems FILE]
                             [--nanochat FOLDER]

rollouts   transformers' `generate`, all answers in one batch, beside the torch engine
step       TRL's GRPOTrainer with transformers' generation, beside sampling and learning
sft        transformers' model, with torch's AdamW, beside a supervised step

nanochat joins in all three where its code is at hand, in FOLDER: model, engine and optimizers of
October 2025, whose architecture is aquarl's, driven as its `scripts/chat_rl.py` does (a prompt at a
time, 8 or 16 answers a batch) and `chat_sft.py` (all rows in a batch). What differs from there: no
top-k, and embeddings in fp32 as all else is, but for what its optimizer Muon makes bf16.

One line of JSON for each, on a CPU: they have the same weights (exported, `serve/hf.py`), prompts,
numbers of answers and tokens, fp32, and one process. Needs what `.venv` holds (the extra `dev`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

from aquarl.bench import pieces
from aquarl.bench.floor import measure_machine
from aquarl.bench.pieces import Piece
from aquarl.bench.timing import hardware, measure
from aquarl.bench.work import Work
from aquarl.model.modes import keep_memory
from aquarl.model.products import use_threads
from aquarl.serve.hf import hf_files

PATIENCE_S = 3600.0
"""For one step of TRL's."""


class Exported:
    """The work's policy as transformers has it."""

    def __init__(self, work: Work, folder: Path) -> None:
        self.work, self.folder = work, folder
        for name, body in hf_files(work.model(), work.tokenizer, title="peer", figures={}).items():
            (folder / name).write_bytes(body)
        self.words = AutoTokenizer.from_pretrained(folder)

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder)


def rollouts(peer: Exported, threads: int) -> Callable[[], object]:
    work, model = peer.work, peer.model().eval()
    rows = [list(prompt.ids) for prompt in work.prompt_list for _ in range(work.samples)]
    longest, padding = max(map(len, rows)), peer.words.pad_token_id
    ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows])
    seen = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])

    def run() -> None:
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=seen, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                min_new_tokens=work.max_new, max_new_tokens=work.max_new,
            )  # fmt: skip
        assert out.shape == (len(rows), longest + work.max_new)

    return run


def step(peer: Exported, threads: int) -> Callable[[], object]:
    work, rng = peer.work, random.Random(peer.work.seed)
    together = min(work.micro_prompts, work.prompts)  # in one pass of the learner, as of aquarl's
    config = GRPOConfig(
        output_dir=str(peer.folder / "trl"), max_steps=10**6, seed=work.seed,
        per_device_train_batch_size=together * work.samples, num_generations=work.samples,
        gradient_accumulation_steps=work.prompts // together,
        max_completion_length=work.max_new, generation_kwargs={"min_new_tokens": work.max_new},
        temperature=1.0, top_k=0, beta=0.0, use_cpu=True, bf16=False, gradient_checkpointing=False,
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    asked = [peer.words.decode(list(prompt.ids)) for prompt in work.prompt_list]
    ids = [tuple(peer.words(text, add_special_tokens=False)["input_ids"]) for text in asked]
    assert ids == [prompt.ids for prompt in work.prompt_list]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        assert {len(answer) for answer in completion_ids} == {work.max_new}, "the same work"
        return [rng.random() for _ in completion_ids]

    steps = _Steps(threads)
    steps.run = GRPOTrainer(
        peer.model(),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": asked}),
        processing_class=peer.words,
        callbacks=[steps],
    ).train
    return steps


class _Steps(TrainerCallback):
    """Lets a trainer, in a thread of its own, take one step a call."""

    run: Callable[[], object]

    def __init__(self, threads: int) -> None:
        self._go: SimpleQueue[None] = SimpleQueue()
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._threads = threads
        self._thread = threading.Thread(target=self._train, daemon=True)

    def __call__(self) -> None:
        if not self._thread.is_alive():
            self._thread.start()
        self._go.put(None)
        if (error := self._done.get(timeout=PATIENCE_S)) is not None:
            raise error

    def _train(self) -> None:
        use_threads(self._threads)  # torch counts them for each thread
        try:
            self.run()
        except BaseException as error:
            self._done.put(error)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._go.get()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._done.put(None)


def sft(peer: Exported, threads: int) -> Callable[[], object]:
    work, model = peer.work, peer.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    generator = torch.Generator().manual_seed(work.seed)

    def run() -> None:
        # One more than is trained: the labels are the same row, one place on.
        ids = torch.randint(work.shape.vocab, (work.rows, work.context + 1), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


class Nanochat:
    """The work's policy as nanochat has it."""

    def __init__(self, work: Work, code: Path) -> None:
        self.work = work
        if str(code) not in sys.path:
            sys.path.insert(0, str(code))
        self._gpt, self._engine = map(importlib.import_module, ("nanochat.gpt", "nanochat.engine"))

    def model(self) -> Any:
        shape = self.work.shape
        model = self._gpt.GPT(
            self._gpt.GPTConfig(
                shape.context, shape.vocab, shape.layers, shape.heads, shape.kv_heads, shape.width
            )
        )
        model.load_state_dict(self.work.model().state_dict())
        model.transformer.wte.float()
        return model

    def sampler(self, model: Any, batch: int) -> Callable[[], list[list[list[int]]]]:
        """Return what samples each prompt's answers; those include the prompt."""
        work, engine = self.work, self._engine.Engine(model, _NoSpecialTokens())

        def sample() -> list[list[list[int]]]:
            answers = []
            for place, prompt in enumerate(work.prompt_list):
                rows: list[list[int]] = []
                while len(rows) < work.samples:
                    rows += engine.generate_batch(
                        list(prompt.ids), num_samples=min(batch, work.samples), seed=place,
                        max_tokens=work.max_new, temperature=1.0, top_k=None,
                    )[0]  # fmt: skip
                assert {len(row) - len(prompt.ids) for row in rows} == {work.max_new}
                answers.append(rows)
            return answers

        return sample

    def rollouts(self, batch: int) -> Callable[[], object]:
        return self.sampler(self.model().eval(), batch)

    def step(self, batch: int) -> Callable[[], object]:
        work, model, rng = self.work, self.model(), random.Random(self.work.seed)
        sample, optimizers = self.sampler(model, batch), model.setup_optimizers()

        def run() -> None:
            for prompt, rows in zip(work.prompt_list, sample(), strict=True):
                ids = torch.tensor(rows)
                inputs, targets = ids[:, :-1], ids[:, 1:].clone()
                targets[:, : len(prompt.ids) - 1] = -1
                rewards = torch.tensor([rng.random() for _ in rows])
                advantages = rewards - rewards.mean()
                for some in range(0, len(rows), batch):
                    part = slice(some, some + batch)
                    nll = model(inputs[part], targets[part], loss_reduction="none")
                    objective = -(nll.view_as(inputs[part]) * advantages[part, None]).sum()
                    (-objective / (targets >= 0).sum() / work.prompts).backward()
            self._update(model, optimizers)

        return run

    def sft(self, batch: int) -> Callable[[], object]:
        work, model = self.work, self.model().train()
        optimizers = model.setup_optimizers()
        generator = torch.Generator().manual_seed(work.seed)

        def run() -> None:
            shape = work.rows, work.context + 1
            ids = torch.randint(work.shape.vocab, shape, generator=generator)
            for rows in ids.split(batch):
                model(rows[:, :-1], rows[:, 1:].contiguous()).backward()
            self._update(model, optimizers)

        return run

    def _update(self, model: Any, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)


class _NoSpecialTokens:
    """The tokenizer of nanochat's engine, where no token ends an answer or calls a tool."""

    def encode_special(self, text: str) -> int:
        return -1

    def get_bos_token_id(self) -> int:
        return -1


PEERS: dict[str, tuple[str, Callable[[Exported, int], Callable[[], object]]]] = {
    "rollouts": ("transformers", rollouts),
    "step": ("TRL", step),
    "sft": ("transformers", sft),
}


def main(argv: Sequence[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", nargs="+", default=["d2", "d4"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    for name in ("prompts", "samples", "max_new", "rows", "context"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=Work.__dataclass_fields__[name].default)
    parser.add_argument("--problems", help="a file of problems; generated ones without it")
    parser.add_argument("--nanochat", type=Path, help="a folder with nanochat's code")
    args = vars(parser.parse_args(argv))
    sizes, repeats, threads = args.pop("size"), args.pop("repeats"), args.pop("threads")
    code = args.pop("nanochat")
    disable_progress_bar()
    use_threads(threads)
    keep_memory()
    for size in sizes:
        work, machine = Work(size=size, **args), measure_machine(torch.device("cpu"))
        with tempfile.TemporaryDirectory() as folder:
            peer = Exported(work, Path(folder))
            for kind, (name, make) in PEERS.items():
                ours = getattr(pieces, kind)(work, "cpu", "torch")
                runs = {name: make(peer, threads)}
                batches = (work.rows,) if kind == "sft" else (8, 16)
                for batch in batches if code else ():
                    runs[f"nanochat, {batch}"] = getattr(Nanochat(work, code), kind)(batch)
                peers = {who: Piece(run, ours.tokens, ours.floor_s) for who, run in runs.items()}
                lines = measure({"aquarl": ours} | peers, machine, repeats, "cpu")
                cpu_s = {who: line["cpu_s"] for who, line in lines.items()}
                median = {who: spread["median"] for who, spread in cpu_s.items()}
                about = {
                    "bench": kind,
                    "size": size,
                    "times_aquarls": {
                        who: round(median[who] / median["aquarl"], 2) for who in peers
                    },
                }
                rates = {who: line["tokens_per_cpu_s"] for who, line in lines.items()}
                here = {"hardware": hardware("cpu"), "threads": threads, "repeats": repeats}
                found = {"cpu_s": cpu_s, "tokens_per_cpu_s": rates}
                print(json.dumps(about | found | here), flush=True)


if __name__ == "__main__":
    main()
