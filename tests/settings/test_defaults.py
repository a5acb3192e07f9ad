"""No default stands twice: what settings.py declares is repeated by no function and no notebook.

Notebooks are held by tests/app/test_params.py.
"""

import ast
import runpy
from pathlib import Path

import vitgal
from vitgal.settings import sections

PACKAGE = Path(vitgal.__file__).parent


def declared_defaults() -> dict[str, set[str]]:
    """Field and flat name of every setting -> its default as source text; no 0, 1, None, bool."""
    defaults: dict[str, set[str]] = {}
    for kind in (*sections.SECTIONS, sections.MatchingSettings, sections.VerificationSettings):
        for flat, entry in kind.flat().items():
            for name in (flat, entry.name):
                if entry.default not in (None, True, False, 0, 1, ""):
                    defaults.setdefault(name, set()).add(repr(entry.default))
    return defaults


def repeated(source: str, defaults: dict[str, set[str]]) -> list[str]:
    """Parameters and dataclass fields of a source that repeat a setting's default as a literal."""
    result = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            positional = node.args.posonlyargs + node.args.args
            pairs = [*zip(reversed(positional), reversed(node.args.defaults), strict=False)]
            pairs += [*zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
            named = [(argument.arg, default) for argument, default in pairs if default]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            named = [(node.target.id, node.value)]
        else:
            continue
        for name, default in named:
            try:
                value = ast.literal_eval(default)
            except ValueError:
                continue  # an expression, such as MatchingSettings.max_distance
            if repr(value) in defaults.get(name, ()):
                result.append(f"line {default.lineno}: {name} = {value!r}")
    return result


def test_no_function_repeats_a_default():
    defaults = declared_defaults()
    twice = {
        str(path.relative_to(PACKAGE)): lines
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parts[-2] != "settings" and (lines := repeated(path.read_text(), defaults))
    }
    assert twice == {}


def test_a_repeated_default_is_seen():
    defaults = declared_defaults()
    for source in (
        "def match(a, max_distance: float = 0.82): pass",
        "def rerank(a, *, top=100): pass",
        "class A:\n    threshold: float = 16.0",
        "def f(local_size: int = 512): pass",
    ):
        assert len(repeated(source, defaults)) == 1, source
    for source in (
        "def match(a, max_distance: float = MatchingSettings.max_distance): pass",
        "def match(a, max_distance: float = 0.5): pass",
        "def f(a=100): pass",
    ):
        assert repeated(source, defaults) == [], source


def test_the_table_in_docs_is_current():
    docs = PACKAGE.parent / "docs"
    printed = runpy.run_path(str(docs / "settings_table.py"))["settings_table"]()
    assert (docs / "settings.md").read_text() == printed
