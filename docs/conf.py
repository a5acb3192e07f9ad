"""The site: `make docs` builds it into build/site, without network; warnings are errors."""

import json
from dataclasses import fields
from importlib import metadata
from pathlib import Path

from docutils import nodes
from latex2mathml import converter
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.writers.html5 import HTML5Translator

from vitgal import runs
from vitgal.settings.section import Section, fact
from vitgal.viz.report import write_report

project = "ViTGaL, explained and executable"
author = "The authors of vitgal"
version = release = metadata.version("vitgal")
language = "en"

# The sources are the checkout itself, so that links between folders work in both readings.
root_doc = "docs/index"
include_patterns = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "docs/api/*.md",
    "notebooks/*.ipynb",
    "benchmarks/README.md",
    "weights/README.md",
    "third_party/README.md",
]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

nb_execution_mode = "off"  # the outputs are those of the demo run, which the tests hold
nb_mime_priority_overrides = [
    ("html", "image/png", 5),
    ("html", "image/jpeg", 5),
    ("html", "text/plain", 10),
]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 4
napoleon_use_ivar = True
autodoc_typehints = "description"
autodoc_member_order = "bysource"
suppress_warnings = [
    "mystnb.unknown_mime_type",  # the widgets, beside which a picture is stored
    "myst.header",  # a notebook's chapters begin at levels of their own
    "ref.python",  # a public name stands in its package and at the top
]

# The chapters that show the demo run's page, and the view they begin with.
VIEWS = {
    "docs/report": "view=overview",
    "notebooks/04_global_evaluation": "view=overview",
    "notebooks/06_rerank": "view=ranking",
    "notebooks/07_match_visualization": "view=pair",
}

html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_title = "ViTGaL"
html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
}


def refuse_unexecuted(app: Sphinx) -> None:
    """Stops the build, with its name, at a notebook with a code cell that has not been run."""
    for path in sorted(Path(app.srcdir, "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        if any(
            cell["cell_type"] == "code" and cell["source"] and not cell["execution_count"]
            for cell in cells
        ):
            raise ExtensionError(f"{path.name} has cells that were not run: run the demo first")


def write_instrument(app: Sphinx) -> None:
    """Writes the page of the demo run beside the site, where that run exists."""
    run = runs.run_folder("demo")
    if app.builder.format == "html" and list(run.glob("*/global/scores.json")):
        write_report([run], Path(app.outdir, "instrument"))


def show_instrument(app: Sphinx, page: str, template: str, context: dict, tree: object) -> None:
    """Puts the demo run's page below the chapters that are about it."""
    if page in VIEWS and Path(app.outdir, "instrument", "index.html").exists():
        address = f"{'../' * page.count('/')}instrument/index.html#{VIEWS[page]}"
        context["body"] += (
            f'<h2>Explore this run</h2><iframe src="{address}" title="The demo run, to explore" '
            'loading="lazy" style="width: 100%; height: 46rem; border: 1px solid #8888"></iframe>'
        )


def widen(app: Sphinx, page: str, template: str, context: dict, tree: object) -> None:
    """Gives the text the width of a line of code."""
    context["metatags"] = context.get("metatags", "") + (
        "<style>.bd-page-width {max-width: 104rem} .bd-sidebar-primary {max-width: 17rem}"
        " .bd-main .bd-content .bd-article-container {max-width: 64rem}</style>"
    )


def write_math(self: HTML5Translator, node: nodes.math) -> None:
    """Writes a formula as MathML, which browsers draw by themselves."""
    if isinstance(node, nodes.math_block):
        formula = converter.convert(node.astext(), display="block")
        self.body.append(f'<div style="margin: 1rem 0">{formula}</div>')
    else:
        self.body.append(converter.convert(node.astext()))
    raise nodes.SkipNode


def skip_field(app: Sphinx, what: str, name: str, member: object, *options: object) -> bool | None:
    """Leaves out a named tuple's fields, which its docstring describes."""
    return True if str(member.__doc__).startswith("Alias for field number") else None


def complete(app: Sphinx, what: str, name: str, member: object, options: dict, lines: list) -> None:
    """Keeps a colon in a Returns section from ending a type; gives each setting its meaning."""
    for number, line in enumerate(lines[:-1], start=1):
        if line.strip() == "Returns:":
            said = lines[number].lstrip()
            lines[number] = lines[number].removesuffix(said) + f": {said}"
    if isinstance(member, type) and issubclass(member, Section) and member is not Section:
        own = [entry for entry in fields(member) if "fact" in entry.metadata]
        lines += ["", "Args:", *(f"    {entry.name}: {fact(entry).meaning}" for entry in own), ""]


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("autodoc-skip-member", skip_field)
    app.connect("autodoc-process-docstring", complete, priority=400)  # before napoleon, at 500
    app.connect("builder-inited", refuse_unexecuted)
    app.connect("builder-inited", write_instrument)
    app.connect("html-page-context", show_instrument)
    app.connect("html-page-context", widen)
