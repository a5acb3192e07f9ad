"""The command line: `vitgal run | download | weights | compare | own`, also `python -m vitgal`."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from vitgal import runs


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    0: success. 1: the work failed. 2: the command was wrong. 75: SIGTERM came, start it again.
    130: Ctrl-C was pressed.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print("\nvitgal: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"vitgal: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitgal", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _run_parser(commands.add_parser("run", help="execute the notebooks 01 to 07 in order"))
    _download_parser(commands.add_parser("download", help="fetch data sets and weights"))
    _own_parser(commands.add_parser("own", help="search a folder of your own photographs"))
    weights = commands.add_parser("weights", help="convert a published .pth to .safetensors")
    weights.add_argument("source", type=Path, metavar="SOURCE.pth", help="or our .safetensors")
    weights.add_argument("target", type=Path, metavar="TARGET.safetensors")
    weights.add_argument("--half", action="store_true", help="float16: half the size")
    weights.set_defaults(command=_weights)
    _compare_parser(commands.add_parser("compare", help="test two runs against each other"))
    return parser


def _run_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("params", type=Path, metavar="PARAMS.yaml", help="see params/")
    parser.add_argument("--only", metavar="04,05", help="just these notebooks")
    parser.add_argument("--from", dest="first", metavar="02", help="begin with this notebook")
    parser.add_argument("--to", dest="last", metavar="06", help="end with this notebook")
    _add_overrides(
        parser, "a parameter that beats the file; relative paths are relative to this folder"
    )
    parser.add_argument("--output", type=Path, metavar="runs/NAME", help="the run folder")
    parser.set_defaults(command=_run)


def _add_overrides(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "-p",
        dest="overrides",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help=text,
    )


def _run(options: argparse.Namespace) -> int:
    def execute() -> str:
        """Executes the notebooks and returns the summary of their run."""
        from vitgal.app import pipeline, summary

        folder = pipeline.run(
            options.params,
            only=options.only.split(",") if options.only else None,
            first=options.first,
            last=options.last,
            overrides=dict(options.overrides),
            output=options.output,
        )
        return summary.summary(folder)

    return _execute_notebooks(execute)


def _execute_notebooks(execute: Callable[[], str]) -> int:
    """Prints what `execute` returns, or its error; returns the exit status."""
    # Set before torch is loaded and inherited by the kernels: waiting threads sleep. By default
    # they spin, which slows two busy processes on one machine tenfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from vitgal.app.execution import Interrupted, Preempted
    from vitgal.app.pipeline import RESTART
    from vitgal.settings.section import SettingsError

    try:
        print(execute())
    except (SettingsError, FileNotFoundError) as error:
        print(f"vitgal: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"\nvitgal: {error}", file=sys.stderr)
        return 130
    except Preempted as error:
        print(f"vitgal: {error}", file=sys.stderr)
        return RESTART
    return 0


def _own_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="photographs, any sub-folders")
    parser.add_argument("--query", required=True, metavar="IMAGE", help="one of them, or any file")
    parser.add_argument("--box", metavar="x0,y0,x1,y1", help="what of it, in pixels")
    _add_overrides(parser, "another parameter of notebook 08, such as weights")
    parser.add_argument("--output", type=Path, metavar="runs/NAME", help="the run with the model")
    parser.set_defaults(command=_own)


def _own(options: argparse.Namespace) -> int:
    def execute() -> str:
        """Executes notebook 08 and returns the summary of its search."""
        from vitgal.app import pipeline, summary

        folder = pipeline.run_own(
            options.folder,
            options.query,
            options.box,
            overrides=dict(options.overrides),
            output=options.output,
        )
        return summary.own_summary(folder)

    return _execute_notebooks(execute)


def _download_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="from third_party/sources.toml")
    parser.add_argument("--to", type=Path, metavar="data/", help="default: data/ of the checkout")
    parser.add_argument("--list", action="store_true", help="what there is")
    parser.add_argument("--check", metavar="NAME", help="verify an existing folder")
    parser.set_defaults(command=_download)


def _download(options: argparse.Namespace) -> int:
    from vitgal.data.download import checks, sources, transfer

    if options.list:
        for source in sources.list_sources().itertuples():
            print(f"{source.Index:<24}{source.GB:>8.2f} GB  {source.about}")
        return 0
    if options.check:
        report = checks.check(options.check, folder=options.to or runs.resolve("data"))
        print(report)
        return 0 if report.ok else 1
    if not options.names:
        print("vitgal: name what to download; --list shows what there is", file=sys.stderr)
        return 2
    for name, folder in transfer.download(options.names, target=options.to).items():
        print(f"{name}: {folder}")
    return 0


def _weights(options: argparse.Namespace) -> int:
    from vitgal.models import weights as models_weights

    dtype = "float16" if options.half else "float32"
    print(models_weights.convert(options.source, options.target, dtype=dtype))
    return 0


def _compare_parser(parser: argparse.ArgumentParser) -> None:
    level = "a run, a data set's folder in it, or a stage's, as runs/demo/demo/global"
    parser.add_argument("first", metavar="runs/A", help=level)
    parser.add_argument("second", metavar="runs/B", help="the same, compared with the first")
    parser.add_argument("--queries", type=int, default=5, metavar="5", help="how many are listed")
    parser.add_argument("--seed", type=int, default=0, metavar="0", help="of the resampling")
    parser.set_defaults(command=_compare)


def _compare(options: argparse.Namespace) -> int:
    from vitgal.evaluation import comparison

    results = comparison.compare(options.first, options.second, seed=options.seed)
    shown = max(0, options.queries)
    reports = [comparison.report(each, label, shown=shown) for label, each in results.items()]
    print("\n\n\n".join(reports))
    print("\np: sign-flip permutation test over queries; ~ marks a sample of all flips")
    return 0
