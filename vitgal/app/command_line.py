"""The command line.

`vitgal run | own | audit | export | notebooks | download | weights | compare | table | report`.

Also `python -m vitgal`.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from vitgal import runs

LEVEL = "a run, or the folder of a data set or stage in it, such as runs/demo/demo/global"


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    0: success. 1: an error. 2: a wrong command. 75: SIGTERM was received; start the command again.
    130: Ctrl-C was pressed.
    """
    escape_output()
    # Set before torch is loaded and inherited by the kernels: waiting threads sleep. By default
    # they spin, which slows two busy processes on one machine a lot.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = _parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except KeyboardInterrupt:
        say("\nvitgal: interrupted", sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        say(f"vitgal: {error}", sys.stderr)
        return getattr(error, "status", 1)


def escape_output() -> None:
    """Makes the standard streams write escapes for characters that they cannot encode."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has no encoding
            stream.reconfigure(errors="backslashreplace")


def say(text: object, stream: object = None) -> None:
    """Prints a text line by line, with control characters escaped.

    The rest is dropped without an error if the reader of a pipe has ended, as `head` does.
    """
    stream = stream or sys.stdout
    try:
        print("\n".join(map(runs.printable, str(text).split("\n"))), file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)  # otherwise Python reports the rest at exit
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _Parser(argparse.ArgumentParser):
    """A parser that reads a text such as -5,0,90,80 as a value, not as an option."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"-[\d.]")

    def error(self, message: str) -> NoReturn:
        """Ends the process with the usage, an escaped message and status 2."""
        super().error(runs.printable(message))


def _parser() -> argparse.ArgumentParser:
    about = "Landmark image retrieval. Begin with `vitgal run params/demo.yaml`; see README.md."
    parser = _Parser(prog="vitgal", description=about)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    every = (_add_run, _add_download, _add_own, _add_notebooks, _add_audit, _add_export)
    for add in (*every, _add_weights, _add_compare, _add_table, _add_report):
        add(commands)
    return parser


Commands = argparse._SubParsersAction  # argparse has no public name for it
Command = Callable[[argparse.Namespace], int | None]  # its exit status, if not 0


def _add(commands: Commands, name: str, about: str, command: Command) -> argparse.ArgumentParser:
    """Adds a command, whose own help begins with the line that the list of commands shows."""
    text = f"{about[0].upper()}{about[1:]}."
    parser = commands.add_parser(name, help=about, description=text)
    parser.set_defaults(command=command)
    return parser


def add_overrides(parser: argparse.ArgumentParser, override: str | None, output: str) -> None:
    """Adds -p NAME VALUE and --output, with these help texts."""
    pair = ("NAME", "VALUE")
    parser.add_argument(
        "-p", dest="overrides", nargs=2, action="append", default=[], metavar=pair, help=override
    )
    parser.add_argument("--output", type=Path, metavar="runs/NAME", help=output)


def _add_run(commands: Commands) -> None:
    run = _add(commands, "run", "execute the notebooks 01 to 07 in order", _run)
    run.add_argument("params", type=Path, metavar="PARAMS.yaml", help="a file of params/")
    run.add_argument("--only", metavar="04,05", help="only these notebooks")
    run.add_argument("--from", dest="first", metavar="02", help="begin with this notebook")
    run.add_argument("--to", dest="last", metavar="06", help="end with this notebook")
    again = "also execute unchanged notebooks"
    run.add_argument("--again", action="store_true", help=again)
    relative = "a setting in place of the file's; relative paths start in the current folder"
    add_overrides(run, relative, "the run folder")


def _run(options: argparse.Namespace) -> None:
    from vitgal.app import pipeline, summary

    folder = pipeline.run(
        options.params if options.params.exists() else runs.resolve(options.params),
        only=options.only.split(",") if options.only else None,
        between=(options.first, options.last),
        again=options.again,
        overrides=dict(options.overrides),
        output=options.output,
    )
    say(summary.summary(folder))


def _add_download(commands: Commands) -> None:
    download = _add(commands, "download", "fetch data sets and weights", _download)
    download.add_argument("names", nargs="*", metavar="NAME", help="from third_party/sources.toml")
    where = "default: data/ of the checkout, or here"
    download.add_argument("--to", type=Path, metavar="data/", help=where)
    download.add_argument("--list", action="store_true", help="list what can be downloaded")
    download.add_argument("--check", metavar="NAME", help="verify an existing folder")


def _download(options: argparse.Namespace) -> int:
    from vitgal.data.download import checks, sources, transfer

    if options.list:
        for source in sources.list_sources().itertuples():
            say(f"{source.Index:<24}{source.GB:>8.2f} GB  {source.about}")
        return 0
    if options.check:
        report = checks.check(options.check, folder=options.to or runs.resolve("data"))
        say(report)
        return 0 if report.ok else 1
    if not options.names:
        say("vitgal: download needs a name; `vitgal download --list` prints the names", sys.stderr)
        return 2
    for name, folder in transfer.download(options.names, target=options.to).items():
        say(f"{name}: {folder}")
    return 0


def _add_own(commands: Commands) -> None:
    own = _add(commands, "own", "search a folder of your own photographs", _own)
    own.add_argument("folder", type=Path, metavar="FOLDER", help="photographs, with sub-folders")
    query = "a photograph of it, or any file; may be repeated; without: every photograph"
    own.add_argument(
        "--query", dest="queries", action="append", default=[], metavar="IMAGE", help=query
    )
    every = "every photograph in it"
    own.add_argument("--queries", dest="query_folder", type=Path, metavar="FOLDER", help=every)
    own.add_argument("--box", metavar="x0,y0,x1,y1", help="part of a single query, in pixels")
    own.add_argument("--places", action="store_true", help="group the folder into places")
    run = "the run of the model; results go there"
    add_overrides(own, "another parameter of notebook 08, such as weights", run)


def _own(options: argparse.Namespace) -> None:
    from vitgal.app import own, pipeline, summary

    overrides, output = dict(options.overrides), options.output
    single = len(options.queries) == 1 and not (options.query_folder or options.places)
    if single:  # notebook 08 shows its answer
        folder = pipeline.run_own(
            options.folder,
            options.queries[0],
            options.box,
            overrides=overrides,
            output=output,
        )
        say(summary.own_summary(folder))
    _, lines = own.search_own(
        options.folder,
        options.queries,
        options.query_folder,
        box=options.box,
        places=options.places,
        overrides=overrides,
        output=output,
    )
    say("\n".join(lines[-1:] if single else lines))


def _add_notebooks(commands: Commands) -> None:
    notebooks = _add(commands, "notebooks", "lay out notebooks and params to work with", _notebooks)
    notebooks.add_argument("folder", type=Path, nargs="?", default=Path(), metavar="FOLDER")


def _notebooks(options: argparse.Namespace) -> None:
    from vitgal.app.layout import lay_out

    for path in lay_out(options.folder):
        say(f"kept, it differs from the one that vitgal brings: {path}")
    say(f"notebooks/ and params/ are in {options.folder.absolute()}")


def _add_audit(commands: Commands) -> None:
    audit = _add(commands, "audit", "find copies within a folder or between two", _audit)
    audit.add_argument("folder", type=Path, metavar="FOLDER", help="such as training images")
    audit.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="such as test images")
    audit.add_argument("--to", type=Path, metavar="FOLDER", help="default: runs/audit/<its name>")
    table = "GLDv2's table: counts FOLDER's landmarks that OTHER shows"
    audit.add_argument("--table", type=Path, metavar="train.csv", help=table)
    _add_description(audit, 10, "similar images that each is compared with")


def _add_description(parser: argparse.ArgumentParser, neighbours: int, count: str) -> None:
    parser.add_argument("--weights", metavar="FILE", help="describe with this model, or timm:NAME")
    number = str(neighbours)
    parser.add_argument("--neighbours", type=int, default=neighbours, metavar=number, help=count)


def _audit(options: argparse.Namespace) -> None:
    from vitgal.app.folder_commands import audit_folders

    report = audit_folders(
        options.folder,
        options.other,
        to=options.to,
        table=options.table,
        weights=options.weights,
        neighbours=options.neighbours,
    )
    say(report)


def _add_export(commands: Commands) -> None:
    export = _add(commands, "export", "features and matches for other programs", _export)
    export.add_argument("folder", type=Path, metavar="FOLDER", help="your own photographs")
    programs = ("hloc", "colmap", "kapture")
    export.add_argument("--to", dest="target", required=True, choices=programs)
    output = "default: runs/export/<its name>-<program>"
    export.add_argument("--output", type=Path, metavar="FOLDER", help=output)
    _add_description(export, 20, "similar photographs that each is matched with")


def _export(options: argparse.Namespace) -> None:
    from vitgal.app.folder_commands import export_folder

    report = export_folder(
        options.folder,
        options.target,
        output=options.output,
        weights=options.weights,
        neighbours=options.neighbours,
    )
    say(report)


def _add_weights(commands: Commands) -> None:
    weights = _add(commands, "weights", "convert a published .pth to .safetensors", _weights)
    source = "or a model of vitgal, .safetensors; or timm:NAME@FILE"
    weights.add_argument("source", type=Path, metavar="SOURCE.pth", help=source)
    weights.add_argument("target", type=Path, metavar="TARGET.safetensors")
    size = weights.add_mutually_exclusive_group()
    size.add_argument("--half", action="store_true", help="float16: half the size")
    size.add_argument("--int8", action="store_true", help="8 bits: a quarter of the size")


def _weights(options: argparse.Namespace) -> None:
    from vitgal.models.weights import convert

    dtype = "int8" if options.int8 else "float16" if options.half else "float32"
    say(convert(options.source, options.target, dtype=dtype))


def _add_compare(commands: Commands) -> None:
    compare = _add(commands, "compare", "test two runs against each other", _compare)
    compare.add_argument("first", metavar="runs/A", help=LEVEL)
    compare.add_argument("second", metavar="runs/B", help="the same, to compare with the first")
    number = "number of queries listed"
    compare.add_argument("--queries", type=int, default=5, metavar="5", help=number)
    plain = "adds the tests over single queries"
    compare.add_argument("--by-query", action="store_true", help=plain)
    compare.add_argument("--seed", type=int, default=0, metavar="0", help="seed of the resampling")


def _compare(options: argparse.Namespace) -> None:
    from vitgal.evaluation import comparison

    results = comparison.compare(options.first, options.second, seed=options.seed)
    listed = max(0, options.queries)
    reports = [
        comparison.report(result, label, listed=listed, plain=options.by_query)
        for label, result in results.items()
    ]
    say("\n\n\n".join(reports))
    say("\np: sign-flip permutation test over landmarks; ~ marks a sample of all flips")


def _add_table(commands: Commands) -> None:
    table = _add(commands, "table", "set systems side by side on one benchmark", _table)
    table.add_argument("runs", nargs="+", metavar="RUN", help=LEVEL)
    table.add_argument("--dataset", metavar="NAME", help="where the runs have several in common")
    published = "add published results, in their own columns"
    table.add_argument("--published", action="store_true", help=published)
    to = "also write .md, .csv or .tex; may be repeated"
    table.add_argument("--to", type=Path, action="append", default=[], metavar="FILE", help=to)
    table.add_argument("--seed", type=int, default=0, metavar="0", help="seed of the resampling")


def _table(options: argparse.Namespace) -> None:
    from vitgal import evaluation

    table = evaluation.system_table(
        options.runs, dataset=options.dataset, published=options.published, seed=options.seed
    )
    say(evaluation.as_text(table))
    for path in options.to:
        for written in evaluation.write_table(table, path):
            say(f"written: {written}")


def _add_report(commands: Commands) -> None:
    report = _add(commands, "report", "write runs as a page to explore in a browser", _report)
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its name")
    report.add_argument("--to", type=Path, metavar="FOLDER", help="default: report/ in the first")
    report.add_argument("--ranks", type=int, default=100, metavar="100", help="images per ranking")
    matched = "matched images per query"
    report.add_argument("--pairs", type=int, default=4, metavar="4", help=matched)
    report.add_argument("--single-file", action="store_true", help="all images inside index.html")


def _report(options: argparse.Namespace) -> None:
    from vitgal.viz.report import write_report

    page = write_report(
        [Path(run) if Path(run).is_dir() else runs.run_folder(run) for run in options.runs],
        options.to,
        ranks=max(1, options.ranks),
        pairs=max(0, options.pairs),
        single_file=options.single_file,
    )
    say(page)
