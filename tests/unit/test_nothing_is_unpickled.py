"""Files are never unpickled: no call in the package could run what a file says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import medssl

PACKAGE = Path(medssl.__file__).parent
OWN_PIPES = PACKAGE / "executors"
"""Parent and workers of one run pass pickles through pipes; `pickle.loads` of bytes, no file."""

UNPICKLERS = {
    "pickle.load", "pickle.Unpickler", "joblib.load", "cloudpickle.load", "cloudpickle.loads",
    "dill.load", "dill.loads", "shelve.open", "pandas.read_pickle", "pd.read_pickle",
    "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
}  # fmt: skip


def problems(source: str, path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        where = f"{path.name}, line {node.lineno}: {called}"
        if called in UNPICKLERS:
            yield where
        if called == "pickle.loads" and path.parent != OWN_PIPES:
            yield where
        if called == "torch.load" and given.get("weights_only") != "True":
            yield f"{where} without weights_only=True"
        if called.endswith(("np.load", "numpy.load")) and given.get("allow_pickle") == "True":
            yield f"{where} with allow_pickle"


def imports(source: str) -> Iterator[str]:
    """Yield names that would hide a call from `problems`: ``from torch import load``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "pickle", "numpy"):
            for alias in node.names:
                if alias.name in ("load", "loads", "Unpickler"):
                    yield f"from {node.module} import {alias.name}"


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_module_unpickles_a_file(path: Path):
    source = path.read_text(encoding="utf-8")
    assert [*problems(source, path), *imports(source)] == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "pickle.load(stream)",
        "pickle.loads(content)",
        "pickle.Unpickler(stream).load()",
        "np.load(file, allow_pickle=True)",
        "from pickle import loads",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str):
    assert [*problems(source, PACKAGE / "models" / "x.py"), *imports(source)]
