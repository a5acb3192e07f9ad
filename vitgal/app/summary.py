"""A run's scores as a table for the terminal."""

import csv
from pathlib import Path

from vitgal import runs
from vitgal.app.pipeline import OWN

PROTOCOLS = ("easy", "medium", "hard")
KAPPAS = ("1", "5", "10")


def summary(run: Path) -> str:
    """A run's scores as a table (percent), one block a data set, and where to look."""
    run = Path(run)
    rows = []
    for folder in sorted({path.parent.parent for path in run.glob("*/*/scores.json")}):
        rows += ["", *score_lines(folder)]
    figures = sorted(path for path in run.glob("**/figures*") if path.is_dir())
    rows += ["", f"executed notebooks: {run / 'notebooks'}"]
    rows += [f"figures: {path}" for path in figures]
    return "\n".join(rows[1:])


def own_summary(run: Path, lines: int = 10) -> str:
    """The first photographs that the last search found, and where to look."""
    with open(Path(run) / "own" / "ranking.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    width = max([len("photograph"), *(len(row["photograph"]) for row in rows[:lines])])
    found = [f"rank  {'photograph':<{width}}  similarity  inliers"]
    for row in rows[:lines]:
        shown = f"{row['rank']:>4}  {row['photograph']:<{width}}  {float(row['similarity']):>10.2f}"
        found.append(f"{shown}  {row['inliers'] or '-':>7}")
    found += ["", f"all of it: {Path(run) / 'own' / 'ranking.csv'}"]
    return "\n".join([*found, f"executed notebook: {Path(run) / 'notebooks' / OWN}"])


def score_lines(folder: Path) -> list[str]:
    """The scores below `<run>/<dataset>`, aligned: a line a system and protocol, global first.

    mAP comes with its interval as it stands in the file; what a file does not hold is a dash.
    """
    found = {
        path.parent.name: runs.read_json(path) for path in sorted(folder.glob("*/scores.json"))
    }
    order = {"global": "global", "rerank": "reranked"}
    tables = {name: found[name] for name in found if name not in order}
    tables |= {label: found[name] for name, label in order.items() if name in found}
    published = found.get("rerank", {}).get("published")
    if published:
        tables["reranked, published"] = published
    width = max(map(len, [*tables, folder.name]))
    heads = "".join(f"{f'mP@{kappa}':>7}" for kappa in KAPPAS)
    lines = [f"{folder.name:<{width}}  {'':6}{'mAP':>7}{'95 % interval':>16}{heads}"]
    for label, scores in tables.items():
        for protocol in [protocol for protocol in PROTOCOLS if protocol in scores]:
            lines.append(f"{label:<{width}}  {protocol:<6}{_cells(scores[protocol])}")
            label = ""
    return lines


def _cells(scores: dict) -> str:
    """One protocol's mAP, its interval and mP@k in percent, each in its column."""
    low, high = scores.get("interval") or (None, None)
    interval = "-" if low is None else f"{100 * low:.1f} to {100 * high:.1f}"
    at = "".join(_percent(scores.get("mp_at", {}).get(kappa)) for kappa in KAPPAS)
    return f"{_percent(scores.get('map'))}{interval:>16}{at}"


def _percent(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{100 * value:7.1f}"
