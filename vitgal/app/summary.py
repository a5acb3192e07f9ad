"""Tables of a run's results for the terminal."""

import csv
import shlex
from pathlib import Path

from vitgal import runs
from vitgal.app.pipeline import OWN
from vitgal.evaluation.scores import read_scores

PROTOCOLS = ("easy", "medium", "hard")
KAPPAS = ("1", "5", "10")
LISTED = 10  # photographs of an answer that are printed


def summary(run: Path) -> str:
    """Returns a run's scores in percent, a table per data set, its folders, and what shows it."""
    run = Path(run)
    lines = []
    for folder in sorted({path.parent.parent for path in run.glob("*/*/scores.json")}):
        lines += [*score_lines(folder), ""]
    explore = f"to explore it as a page: vitgal report {shlex.quote(str(run))}"
    lines = [*lines, f"executed notebooks: {run / 'notebooks'}", *([explore] if lines else [])]
    figures = sorted(path for path in run.glob("**/figures*") if path.is_dir())
    return "\n".join(lines + [f"figures: {path}" for path in figures])


def own_summary(run: Path) -> str:
    """Returns the first photographs of the last search in a run, and the paths of its files."""
    with open(Path(run) / "own" / "ranking.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    names = [runs.printable(row["photograph"]) for row in rows[:LISTED]]
    width = max(map(len, ["photograph", *names]))
    probable = "probability" in rows[0] if rows else False
    table = [f"rank  {'photograph':<{width}}  similarity  inliers" + "  shows it" * probable]
    for row, name in zip(rows, names, strict=False):
        values = f"{float(row['similarity']):>10.2f}  {row['inliers'] or '-':>7}"
        if probable:
            percent = f"{100 * float(row['probability']):.0f} %" if row["probability"] else "-"
            values += f"  {percent:>8}"
        table.append(f"{row['rank']:>4}  {name:<{width}}  {values}")
    model = Path(run) / "own" / "model.txt"
    if model.is_file():
        table.insert(0, runs.printable(model.read_text(encoding="utf-8").strip()))
    verdict = Path(run) / "own" / "verdict.txt"
    table += ["", *(verdict.read_text(encoding="utf-8").splitlines() if verdict.exists() else [])]
    table += [f"all of it: {Path(run) / 'own' / 'ranking.csv'}"]
    return "\n".join([*table, f"executed notebook: {Path(run) / 'notebooks' / OWN}"])


def score_lines(folder: Path) -> list[str]:
    """Returns the table of the scores below `<run>/<dataset>`, a line for each system and protocol.

    Other systems come first, then the global and the reranked results. A missing value is a dash.
    """
    scores_of = {
        path.parent.name: read_scores(path.parent) for path in sorted(folder.glob("*/scores.json"))
    }
    labels = {"global": "global", "rerank": "reranked"}
    tables = {name: scores for name, scores in scores_of.items() if name not in labels}
    tables |= {label: scores_of[name] for name, label in labels.items() if name in scores_of}
    if published := scores_of.get("rerank", {}).get("published"):
        tables["reranked, published"] = published
    width = max(map(len, [*tables, folder.name]))
    columns = "".join(f"{f'mP@{kappa}':>7}" for kappa in KAPPAS)
    lines = [f"{folder.name:<{width}}  {'':6}{'mAP':>7}{'95 % interval':>16}{columns}"]
    for label, scores in tables.items():
        for protocol in [protocol for protocol in PROTOCOLS if protocol in scores]:
            lines.append(f"{label:<{width}}  {protocol:<6}{_cells(scores[protocol])}")
            label = ""
    return lines


def _cells(scores: dict) -> str:
    low, high = scores.get("interval") or (None, None)
    interval = "-" if low is None else f"{100 * low:.1f} to {100 * high:.1f}"
    precisions = "".join(_percent(scores.get("mp_at", {}).get(kappa)) for kappa in KAPPAS)
    return f"{_percent(scores.get('map'))}{interval:>16}{precisions}"


def _percent(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{100 * value:7.1f}"
