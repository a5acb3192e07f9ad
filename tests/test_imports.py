"""What importing costs, and that a module imports only from modules above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vitgal

PACKAGE = Path(vitgal.__file__).parent
TORCH_FREE = """runs cluster images features store landmarks revisited search approximate
    evaluation comparison external reranking plots figures""".split()
ORDER = [
    *TORCH_FREE,
    *"download demo model weights local_features extraction tuning inspection own".split(),
    *"augmentation recipe training_data trainer distillation pipeline training explore".split(),
    *"__main__ __init__".split(),
]


def loaded(statement: str) -> set[str]:
    """The modules in a fresh interpreter after one statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return set(child.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("module", TORCH_FREE)
def test_no_torch(module):
    found = loaded(f"import vitgal.{module}")
    assert f"vitgal.{module}" in found
    assert not {"torch", "timm", "accelerate"} & found


def test_the_package_alone_loads_nothing():
    found = loaded("import vitgal")
    assert {name for name in found if name.startswith("vitgal")} == {"vitgal"}
    assert not {"numpy", "torch", "pandas", "papermill"} & found


def test_help_needs_no_notebook_machinery():
    found = loaded("from vitgal.__main__ import _parser; _parser()")
    assert not {"torch", "papermill", "pandas"} & found


def imported(tree: ast.AST) -> set[str]:
    """The vitgal modules that a source imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("vitgal.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "vitgal":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.removeprefix("vitgal."))
    return found & set(ORDER)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_modules_import_upwards_only(path):
    assert path.stem in ORDER, "a new module needs its place in ORDER"
    above = set(ORDER[: ORDER.index(path.stem)])
    assert imported(ast.parse(path.read_text())) <= above


def test_imported_sees_every_form():
    source = (
        "import vitgal.runs\nfrom vitgal import images\ndef f():\n    from vitgal.store import x"
    )
    assert imported(ast.parse(source)) == {"runs", "images", "store"}


@pytest.mark.parametrize("name", vitgal.__all__)
def test_public_names_resolve(name):
    assert callable(getattr(vitgal, name))


def test_public_names():
    contract = """load_model initial_weights extract_global extract_local match verify evaluate
        load_ground_truth FeatureStore LocalFeatures"""
    assert set(contract.split()) <= set(vitgal.__all__) <= set(dir(vitgal))
    assert vitgal.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = vitgal.no_such_name
