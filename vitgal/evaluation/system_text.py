r"""A `SystemTable` as text for a terminal, Markdown, LaTeX and CSV.

Names come from folders and files, so characters with a meaning in Markdown or LaTeX are escaped.
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from vitgal import runs
from vitgal.data.revisited import PROTOCOLS
from vitgal.evaluation.comparison import ABSENT, aligned, ends_text, interval_text
from vitgal.evaluation.systems import SystemTable, TableError

LISTED = 10  # pairs whose tests the text lists
_LATEX = {character: f"\\{character}" for character in "{}$&#_%"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "–": "--",
}


def display_table(
    table: SystemTable, better: str = " >{}", escape: Callable[[str], str] = str
) -> pd.DataFrame:
    """Returns the table as text, one row per system, without empty columns.

    better: how the systems that one is better than are written behind its mAP. escape: applied to
    names.
    """
    systems = table.systems
    named = {
        name: [escape(runs.printable(value)) or ABSENT for value in systems[name]]
        for name in ("system", "network", "size", "device", "source")
    }
    columns = {name: named[name] for name in ("system", "network", "size")}
    dimensions = (_numbers(systems[name]) for name in ("dimension", "local dimension"))
    columns["dim"] = [
        own if local == ABSENT else f"{own} / local {local}"
        for own, local in zip(*dimensions, strict=True)
    ]
    for protocol in PROTOCOLS:
        ends = systems[[protocol, f"{protocol} low", f"{protocol} high"]].to_numpy(float)
        worse = [", ".join(map(str, numbers)) for numbers in systems[f"{protocol} better than"]]
        columns[protocol.capitalize()] = [
            interval_text(*row) + (better.format(names) if names else "")
            for row, names in zip(ends, worse, strict=True)
        ]
    precisions = systems[[f"{protocol} mP@10" for protocol in PROTOCOLS]].to_numpy(float)
    columns["mP@10 E/M/H"] = [
        ABSENT if np.isnan(row).all() else " / ".join(_number(value, 1) for value in row)
        for row in precisions
    ]
    columns["ms/image"] = _numbers(systems["ms an image"], 1)
    columns["ms/query"] = _numbers(systems["ms a query"])
    columns["bytes/image"] = _numbers(systems["bytes an image"])
    columns["device"] = named["device"]
    for protocol in PROTOCOLS:
        if f"published {protocol}" in systems:
            published = systems[f"published {protocol}"]
            columns[f"published {protocol.capitalize()}"] = _numbers(published, 1)
    columns["source"] = named["source"]
    text = pd.DataFrame(columns, index=systems.index)
    return text.loc[:, (text != ABSENT).any()]


def _numbers(values: pd.Series, digits: int = 0) -> list[str]:
    return [_number(value, digits) for value in values]


def _number(value: float, digits: int) -> str:
    return ABSENT if np.isnan(value) else f"{value:,.{digits}f}"


def notes(table: SystemTable) -> list[str]:
    """Returns the sentences that explain a table: the interval, the tests, times, publications."""
    measured = len(table.measured)
    lines = [
        f"{table.dataset}, {table.queries} queries: mAP in percent (95 % interval), mP@10 in "
        "percent under Easy, Medium and Hard.",
        f"{str(table.landmarks).capitalize()}.",
    ]
    if measured > 1:
        pairs = measured * (measured - 1) // 2
        number = "1 pair" if pairs == 1 else f"{pairs} pairs"
        lines.append(
            "Numbers after a mAP: the systems that it is better than beyond chance (p < 0.05, "
            f"paired sign-flip test, Holm-corrected over {number} per protocol)."
        )
    if table.measured["ms an image"].notna().any():
        lines.append(
            "Times are those of whole stages on each run's own machine; a reranked system's bytes "
            "and time include its local features, and only short-listed images have these."
        )
    if measured < len(table.systems):
        lines.append("Published results were measured elsewhere, and no test compares them.")
    return lines


def as_text(table: SystemTable) -> str:
    """Writes a table for a terminal, with the notes and the tests under Medium."""
    parts = [aligned(display_table(table), str.ljust), "\n".join(notes(table))]
    medium = table.tests[table.tests["protocol"] == "medium"]
    if 0 < len(medium) <= LISTED:
        lines = [
            f"  {row.second} against {row.first}: {row.difference:+.1f} points "
            f"({ends_text(row.low, row.high)}), p {_p_value(row.p_holm)}"
            for row in medium.rename(columns={"p Holm": "p_holm"}).itertuples()
        ]
        parts.append(
            "\n".join(["Medium, with the pair's own interval and the corrected p:", *lines])
        )
    return "\n\n".join(parts)


def _p_value(value: float) -> str:
    return ABSENT if np.isnan(value) else "< 0.001" if value < 0.001 else f"= {value:.3f}"


def as_markdown(table: SystemTable) -> str:
    """Writes a table in GitHub's Markdown."""
    rows = _cells(table, escape_markdown, " <sup>{}</sup>")
    rows.insert(1, ["---"] * len(rows[0]))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *map(escape_markdown, notes(table))]) + "\n"


def as_latex(table: SystemTable) -> str:
    """Writes a table as LaTeX; it needs the package booktabs."""
    header, *rows = (" & ".join(row) for row in _cells(table, escape_latex, "$^{{{}}}$"))
    columns = "r" + "l" * header.count(" & ")
    lines = [r"\begin{tabular}{" + columns + "}", r"\toprule", rf"{header} \\", r"\midrule"]
    lines += [rf"{row} \\" for row in rows] + [r"\bottomrule", r"\end{tabular}"]
    comments = [f"% {line}" for line in notes(table)]
    return "\n".join([r"% needs \usepackage{booktabs}", *comments, *lines]) + "\n"


def _cells(table: SystemTable, escape: Callable[[str], str], better: str) -> list[list[str]]:
    """Returns the header and the rows of a table, escaped."""
    text = display_table(table, better, escape)
    rows = [[str(number), *row] for number, row in zip(text.index, text.to_numpy(), strict=True)]
    return [[escape("#"), *text.columns], *rows]


def escape_markdown(text: str) -> str:
    r"""Returns a text that Markdown shows as it is, also in a cell of a table: \ before signs."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~$&])", r"\\\1", text)


def escape_latex(text: str) -> str:
    """Returns a text that LaTeX prints as it is."""
    return "".join(_LATEX.get(character, character) for character in text)


FORMATS = {".md": as_markdown, ".tex": as_latex}


def write_table(table: SystemTable, path: str | Path) -> list[Path]:
    """Writes a table by the file's ending: .md, .tex or .csv; returns the files.

    A CSV holds numbers, and <name>_tests.csv beside it every test. Raises TableError for another
    ending.
    """
    path = Path(path)
    if path.suffix == ".csv":
        systems = table.systems.copy()
        for protocol in PROTOCOLS:
            column = f"{protocol} better than"
            systems[column] = [" ".join(map(str, numbers)) for numbers in systems[column]]
        tests = path.with_name(f"{path.stem}_tests.csv")
        return [
            runs.write_text(path, systems.to_csv()),
            runs.write_text(tests, table.tests.to_csv(index=False)),
        ]
    if path.suffix not in FORMATS:
        raise TableError(f"{path} ends with none of .md, .csv and .tex: name such a file")
    return [runs.write_text(path, FORMATS[path.suffix](table))]
