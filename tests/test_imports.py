"""CONTRIBUTING.md's layers, read off the source: who may import whom, and who may import Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module imports only from its own folder or from what stands to its left.
NOUNS = ("errors", "records", "storage", "config")
PARTS = ("observe", "data", "tasks", "model", "evaluate")
STAGES = ("train", "rl", "engines", "serve")
ORDER = (*NOUNS, *PARTS, *STAGES, "bench", "cluster", "cli", "ray_jobs")

# Packages that few may import. At module level they would be loaded by whoever imports the module.
RAY = ("cluster", "ray_jobs")
HEAVY = {"ray": RAY, "vllm": ("engines.vllm_",), "wandb": ()}

Import = tuple[str, int, bool]
"""What is imported (dotted), on which line, and whether importing the module does it."""


def sources(root: Path) -> dict[str, Path]:
    """Path of every module by its dotted name without `aquarl.`: `rl.losses`, `ray_jobs.rl`."""
    found = {}
    for folder in (root / "aquarl", root / "ray_jobs"):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[1:] if parts[0] == "aquarl" else parts
            found[".".join(parts).removesuffix("__init__").rstrip(".") or "__init__"] = path
    return found


def imports(path: Path, root: Path) -> Iterator[Import]:
    """Every import of a file, those inside functions and `import_module("...")` included.

    What stands under `if TYPE_CHECKING:` counts for the layers, but does not run.
    """
    package = path.relative_to(root).parent.parts

    def visit(node: ast.AST, runs: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, runs) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            yield from ((f"{module}.{alias.name}", node.lineno, runs) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            argument = node.args[0]
            if name in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield str(argument.value), node.lineno, runs
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        only_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, runs and not later and not only_types)

    yield from visit(ast.parse(path.read_text()), True)


def own(target: str) -> str | None:
    """`aquarl.rl.losses.x` -> `rl.losses.x`; None for what is not the product's own."""
    if target.split(".")[0] == "ray_jobs":
        return target
    return target.removeprefix("aquarl.") if target.startswith("aquarl.") else None


def breaches(root: Path) -> list[str]:
    """One line for each import that points right, between stages, or to Ray from outside."""
    found = []
    for module, path in sources(root).items():
        layer = module.split(".")[0]
        for target, line, runs in imports(path, root):
            where = f"{path.relative_to(root)}:{line} imports {target}"
            package = target.split(".")[0]
            if package == "ray" and layer not in RAY:
                found.append(f"{where}: only cluster/ and ray_jobs/ may")
            elif package in HEAVY and runs and not module.startswith(HEAVY[package] or ("-",)):
                found.append(f"{where} at module level: import it in the function that uses it")
            other = (own(target) or "").split(".")[0]
            if layer == other or layer not in ORDER or other not in ORDER:
                continue
            if layer in STAGES and other in STAGES:
                found.append(f"{where}: stages never import one another")
            elif ORDER.index(other) > ORDER.index(layer):
                found.append(f"{where}: {other} stands to the right of {layer}")
    return found


def cycles(root: Path) -> list[str]:
    """The first way found from each module back to itself, as `a -> b -> a`."""
    modules = sources(root)
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = {name for target, _, _ in imports(path, root) if (name := own(target))}
        graph[module] = {
            next(n for n in (name, name.rpartition(".")[0]) if n in modules)
            for name in names
            if name in modules or name.rpartition(".")[0] in modules
        } - {module}
    found, done = [], set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        if module in way:
            found.append(" -> ".join((*way[way.index(module) :], module)))
        elif module not in done:
            for other in sorted(graph[module]):
                walk(other, (*way, module))
            done.add(module)

    for module in graph:
        walk(module, ())
    return found


def test_every_import_points_left_and_only_the_cluster_layer_knows_ray() -> None:
    assert breaches(ROOT) == []


def test_no_module_imports_itself_by_a_detour() -> None:
    assert cycles(ROOT) == []


def test_every_folder_stands_in_the_order() -> None:
    layers = {module.split(".")[0] for module in sources(ROOT)} - {"__init__"}
    assert layers <= set(ORDER), "give a new folder its place in ORDER, and in CONTRIBUTING.md"


@pytest.mark.parametrize("module", sources(ROOT))
def test_every_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(ast.parse(sources(ROOT)[module].read_text()))


def test_importing_everything_but_the_cluster_loads_no_heavy_package() -> None:
    """In a fresh process: the static check cannot see what other packages import."""
    names = [
        f"aquarl.{module}"
        for module in sources(ROOT)
        if module != "__init__" and not module.startswith(("cluster", "ray_jobs", "engines.vllm_"))
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print([p for p in {sorted(HEAVY)!r} if p in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("aquarl.cluster.relay, aquarl.cluster.stream_actor", ("torch", "ray.train", "ray.data")),
        ("aquarl.cluster.meeting", ("torch",)),
    ],
)
def test_what_only_hires_and_hands_on_starts_without_torch(
    modules: str, heavy: tuple[str, ...]
) -> None:
    """It takes two seconds to import, which a run waits for: with the stream, with the learner."""
    code = f"import sys, {modules}\nprint([p for p in {heavy} if p in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_a_learner_steps_and_resumes_without_torchs_compiler() -> None:
    """It takes a second or two to import, and torch's own optimizers do."""
    code = (
        "import sys\n"
        "from aquarl.config import RLConfig\n"
        "from aquarl.rl.learner import Learner\n"
        "from tests.fakes import make_group, packed, random_model\n"
        "learner = Learner(random_model(), RLConfig())\n"
        "learner.update(packed([make_group([1, 2], [[3], [4]])]), 2, 2)\n"
        "learner.load_state(learner.state())\n"
        "print(learner.step, 'torch._dynamo' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "1 False"


@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        ("data/corpus.py", "from aquarl.model import gpt", "to the right"),
        ("data/corpus.py", "from ..model.gpt import GPT", "to the right"),
        ("rl/losses.py", "def f():\n    from aquarl.engines.vllm_engine import x", "stages never"),
        ("rl/losses.py", "def f():\n    import ray.train", "only cluster/"),
        ("rl/losses.py", "import importlib\nimportlib.import_module('ray')", "only cluster/"),
        ("observe/metrics.py", "import wandb", "at module level"),
        ("engines/torch_engine.py", "import vllm", "at module level"),
    ],
)
def test_a_planted_breach_is_found(tmp_path: Path, module: str, line: str, fault: str) -> None:
    plant(tmp_path, module, line)
    (found,) = breaches(tmp_path)
    assert fault in found and module in found


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("evaluate/scores.py", "from aquarl.model.gpt import GPT\nfrom aquarl import records"),
        ("cluster/launch.py", "import ray\nfrom aquarl.rl import losses, learner"),
        ("engines/vllm_engine.py", "import vllm"),
        ("observe/metrics.py", "def start():\n    import wandb"),
        ("rl/losses.py", "from aquarl.rl.batch import x\nimport raylike"),
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path: Path, module: str, line: str) -> None:
    plant(tmp_path, module, line)
    assert breaches(tmp_path) == []


def test_a_planted_cycle_is_found(tmp_path: Path) -> None:
    plant(tmp_path, "rl/batch.py", "from aquarl.rl.losses import x")
    plant(tmp_path, "rl/losses.py", "def f():\n    from aquarl.rl import batch")
    assert cycles(tmp_path) == ["rl.batch -> rl.losses -> rl.batch"]


def plant(root: Path, module: str, line: str) -> None:
    path = root / "aquarl" / module
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'"""Planted."""\n\n{line}\n')
