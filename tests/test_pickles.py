"""A pickle can run any code, so none that came from outside is ever loaded as one.

What tries to is refused where it is read: test_nanochat.py and test_checkpoint.py. Here the source
is read for calls that would. What Ray sends between its processes, which it admits by token, is the
only pickle there is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_imports import ROOT, sources

PICKLES = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "ray.cloudpickle")
LOADS = ("load", "loads", "open", "Unpickler")


def unsafe_loads(source: str) -> Iterator[str]:
    """Yield what would run code that comes with data, with its line."""
    for node in ast.walk(ast.parse(source)):
        said = ast.unparse(node) if isinstance(node, ast.expr | ast.stmt) else ""
        line = f"{getattr(node, 'lineno', 0)}: {said.splitlines()[0] if said else ''}"
        if isinstance(node, ast.ImportFrom) and node.module in PICKLES:
            yield from (line for alias in node.names if alias.name in LOADS)
        elif isinstance(node, ast.ClassDef):
            methods = {x.name for x in node.body if isinstance(x, ast.FunctionDef)}
            if (
                "Unpickler" in " ".join(map(ast.unparse, node.bases))
                and "find_class" not in methods
            ):
                yield line
        elif isinstance(node, ast.Call):
            module, _, name = ast.unparse(node.func).rpartition(".")
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            is_pickle = module in PICKLES and name in LOADS
            is_whole = (module, name) == ("torch", "load") and given.get("weights_only") != "True"
            runs = not module and name in ("eval", "exec")
            is_trusting = {"allow_pickle", "trust_remote_code"} & {
                key for key, value in given.items() if value != "False"
            }
            if is_pickle or is_whole or runs or is_trusting or name == "read_pickle":
                yield line


def test_no_module_loads_a_pickle() -> None:
    found = {
        f"{module}:{line}"
        for module, path in sources(ROOT).items()
        for line in unsafe_loads(path.read_text())
    }
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle\npickle.loads(b)",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "load_dataset(name, trust_remote_code=True)",
        "pandas.read_pickle(path)",
        "class Mine(pickle.Unpickler):\n    pass",
        "eval(text)",
    ],
)
def test_a_planted_one_is_found(line: str) -> None:
    assert list(unsafe_loads(line))


def test_what_is_safe_is_not_reported() -> None:
    safe = "torch.load(path, weights_only=True)\nmodel.eval()\njson.loads(b)\npickle.dumps(x)"
    assert not list(unsafe_loads(safe))
