"""`vitgal own`: a folder of photographs, the queries, their answers, places and page."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vitgal import runs
from vitgal.app import pipeline
from vitgal.settings import SettingsError

if TYPE_CHECKING:
    from vitgal.stages.own_answers import Answers

LISTED = 20  # queries or places that are printed


def search_own(
    folder: Path,
    queries: Sequence[str] = (),
    query_folder: Path | None = None,
    *,
    box: str | None = None,
    places: bool = False,
    overrides: dict[str, Any] | None = None,
    output: Path | None = None,
) -> tuple[Path, list[str]]:
    """Searches a folder for photographs, writes results.csv and a page, and finds places.

    queries: names in the folder, or files by their paths from the current folder. query_folder: all
    photographs in it are queries too. Without any query, each photograph of the folder is asked for
    its neighbours. box: of a single query, as text. places: also writes places.csv; every
    photograph is asked. overrides, output: as for `pipeline.run_own`. Returns the run folder, and
    what was found, a line each. Raises SettingsError for settings that do not exist or fit, others
    as `describe_folder` and `answer`.
    """
    from vitgal import stages
    from vitgal.data.photographs import find_photograph
    from vitgal.stages import own_answers

    run, parameters = pipeline.plan_own(folder, box, overrides, output)
    ((notebook, values),) = parameters.items()
    settings = pipeline.settings_in(notebook, values)
    if places and (queries or query_folder):
        raise SettingsError("--places asks every photograph: leave out --query and --queries")
    models = stages.own_models(run, values.get("weights"))
    settings = models.complete(settings)
    describer = models.describer(run, settings)
    with runs.locked(run / "own"):
        lines = [models.announce(run)]
        presence = stages.known_presence(describer, settings.reranking)
        if places:
            own_answers.require_presence(presence)
        photographs = stages.describe_folder(Path(folder), describer)
        top, here = photographs.folder, Path.cwd()  # where paths were typed
        named = [str(find_photograph(top, query, here) or query) for query in queries]
        asked = own_answers.named_queries(photographs, named, query_folder, settings.own.query_box)
        answers = own_answers.answer(photographs, asked, settings.reranking, presence)
        lines += photographs.report().split("\n")
        return run, [*lines, *_write(answers, find_places=places)]


def _write(answers: "Answers", *, find_places: bool) -> list[str]:
    """Writes the tables and the page of the answers; returns what is printed of them."""
    from vitgal.stages import own_answers
    from vitgal.viz.own_document import own_document
    from vitgal.viz.report import write_page

    photographs, places, lines = answers.photographs, None, []
    folder = photographs.describer.run / "own"
    results = own_answers.write_answers(answers, folder / "results.csv")
    if find_places:
        places = own_answers.find_places(answers)
        table = own_answers.write_places(photographs, places, folder / "places.csv")
        lines += [*_place_lines(photographs.names, places), f"places: {table}"]
    else:
        lines += _answer_lines(answers.table)
    document, images = own_document(answers, places)
    page = write_page(document, images, folder / "report")
    lines += [f"not asked: {name}: {reason}" for name, reason in answers.left_out.items()]
    return [*lines, f"{len(answers.queries)} queries answered: {results}", f"page: {page}"]


def _answer_lines(table: pd.DataFrame) -> list[str]:
    """The first answer to each of the first queries."""
    first = table.groupby("query", sort=False).head(1)
    lines = []
    for row in first.head(LISTED).itertuples():
        facts = f"similarity {row.similarity:.2f}, {row.inliers} inliers"
        if not np.isnan(row.probability):
            facts += f", shows it with {100 * row.probability:.0f} %"
        lines.append(f"{runs.printable(row.query)}: {runs.printable(row.image)} ({facts})")
    return [*lines, *(["…"] if len(first) > LISTED else [])]


def _place_lines(names: Sequence[str], places: Sequence[Any]) -> list[str]:
    count = f"{len(places)} {'place' if len(places) == 1 else 'places'}"
    lines = [f"{count}, {sum(len(place.members) for place in places)} photographs"]
    for number, place in enumerate(places[:LISTED], 1):
        best = runs.printable(names[place.members[0]])
        lines.append(f"{number:>4}  {len(place.members):>5} photographs, best: {best}")
    return [*lines, *(["      …"] if len(places) > LISTED else [])]
