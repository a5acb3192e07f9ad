"""What importing costs, and that a package imports only from those above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vitgal

PACKAGE = Path(vitgal.__file__).parent
# A package imports from those before it.
ORDER = (
    "runs engines settings data features retrieval evaluation models training stages viz app"
).split()
TORCH_FREE = "runs engines settings data features retrieval evaluation viz".split()
ENTRY_POINTS = ("__main__.py", "training/__main__.py")


def loaded(statement: str) -> set[str]:
    """The modules in a fresh interpreter after one statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return set(child.stdout.split())


def modules(package: str) -> list[str]:
    """The dotted names of a package's modules."""
    files = sorted((PACKAGE / package).rglob("*.py"))
    parts = [path.relative_to(PACKAGE.parent).with_suffix("").parts for path in files]
    return [".".join(part) for part in parts if part[-1] not in ("__init__", "__main__")]


def test_no_torch():
    lines = []
    for package in TORCH_FREE:
        lines += [f"import {name}" for name in modules(package)]
        heavy = "{'torch', 'timm', 'accelerate'}"
        lines.append(f"assert not {heavy} & sys.modules.keys(), {package!r}")
    assert {name for package in TORCH_FREE for name in modules(package)} <= loaded("\n".join(lines))


def test_finished_stages_answer_without_torch():
    names = "benchmark describe extract rank rerank split tuning whitening".split()
    present = loaded("import " + ", ".join(f"vitgal.stages.{name}" for name in names))
    assert not {"torch", "timm", "torchvision"} & present


def test_the_package_alone_loads_nothing():
    present = loaded("import vitgal")
    assert {name for name in present if name.startswith("vitgal")} == {"vitgal"}
    assert not {"numpy", "torch", "pandas", "papermill"} & present


def test_help_needs_no_notebook_machinery():
    present = loaded("from vitgal.app.command_line import _parser; _parser()")
    assert not {"torch", "papermill", "pandas"} & present


def test_a_finished_chain_needs_no_notebook_machinery():
    present = loaded("import vitgal.app.pipeline, vitgal.app.summary")
    assert not {"torch", "papermill", "nbformat", "pandas", "scipy"} & present


def imported(tree: ast.AST) -> set[str]:
    """The sub-packages of vitgal that a source imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("vitgal.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "vitgal":
            names |= {f"vitgal.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vitgal."):
            names.add(node.module)
    return {name.split(".")[1] for name in names} & set(ORDER)


@pytest.mark.parametrize("package", ORDER)
def test_packages_import_upwards_only(package):
    allowed = set(ORDER[: ORDER.index(package) + 1])
    for path in sorted((PACKAGE / package).rglob("*.py")):
        if path.relative_to(PACKAGE).as_posix() in ENTRY_POINTS:
            continue
        assert imported(ast.parse(path.read_text())) <= allowed, path


def test_every_package_has_its_place_in_the_order():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ORDER)


def test_imported_sees_every_form():
    source = (
        "import vitgal.runs\nfrom vitgal import data\ndef f():\n"
        "    from vitgal.features.store import x"
    )
    assert imported(ast.parse(source)) == {"runs", "data", "features"}


@pytest.mark.parametrize("name", sorted(vitgal.__all__))
def test_public_names_resolve(name):
    assert getattr(vitgal, name) is not None


def test_public_names():
    contract = """load_model initial_weights extract_global extract_local match verify evaluate
        load_ground_truth FeatureStore LocalFeatures search rerank open_dataset"""
    assert set(contract.split()) <= set(vitgal.__all__) <= set(dir(vitgal))
    assert vitgal.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = vitgal.no_such_name
