"""`vitgal audit` and `vitgal export`: commands on folders that execute no notebook."""

from pathlib import Path
from typing import TYPE_CHECKING

from vitgal import runs
from vitgal.data import gldv2
from vitgal.data.photographs import PhotographError

if TYPE_CHECKING:
    from vitgal import stages
    from vitgal.settings import Settings

RUN = "audit"  # below runs/ or $VITGAL_RUNS: descriptions, and results without --to
SHOWN = 10  # pairs and landmarks that are printed


def own_network(
    run: Path, weights: str | None
) -> tuple["stages.OwnModels", "stages.Describer", "Settings"]:
    """Returns the models for a folder of photographs, what describes with them, and the settings.

    As notebook 08 chooses them; weights: as for `own_models`.
    """
    from vitgal import stages
    from vitgal.settings import read_settings

    models = stages.own_models(run, weights)
    settings = models.complete(read_settings({}))
    return models, models.describer(run, settings), settings


def export_folder(
    folder: Path,
    target: str,
    *,
    output: Path | None = None,
    weights: str | None = None,
    neighbours: int = 20,
) -> str:
    """Describes a folder of photographs and writes features and verified matches for a program.

    target: see `stages.export_photographs`. output: None is `runs/export/<name>-<target>`. Raises
    PhotographError for a folder or a name that cannot be used.
    """
    from vitgal import stages

    run = runs.run_folder("export")
    name = Path(folder).resolve().name or "folder"
    output = run / f"{name}-{target}" if output is None else Path(output)
    models, describer, settings = own_network(run, weights)
    photographs = stages.describe_folder(folder, describer)
    stages.export_photographs(
        photographs, target, output, settings.reranking, neighbours=neighbours
    )
    return "\n".join([models.reason, photographs.report(), f"for {target}: {output}"])


def audit_folders(
    folder: Path,
    other: Path | None = None,
    *,
    to: Path | None = None,
    table: Path | None = None,
    weights: str | None = None,
    neighbours: int = 10,
) -> str:
    """Finds the copies within a folder or between two, writes files and page, and reports.

    to: receives copies.csv, leave_out.txt, index.html and, between two folders, overlap.csv. table:
    of GLDv2, see `read_landmark_table`; adds the landmarks of `folder` that `other` shows. weights:
    as for `own_models`. Raises PhotographError for folders that cannot be compared.
    """
    from vitgal import stages
    from vitgal.viz.report import write_audit_page

    if table is not None and other is None:
        raise PhotographError("--table needs OTHER, the test images whose landmarks are looked for")
    landmarks = None if table is None else gldv2.read_landmark_table(table)
    run = runs.run_folder(RUN)
    target = run / (Path(folder).resolve().name or "folder") if to is None else Path(to)
    for part in filter(None, (folder, other)):
        if target.resolve().is_relative_to(part.resolve()):
            raise PhotographError(
                f"{target} lies in {part}, whose images would then be audited with the results: "
                "name another folder by --to"
            )
    models, describer, settings = own_network(run, weights)
    result = stages.find_copies(
        folder,
        other,
        describer=describer,
        store=run / "descriptors",
        neighbours=neighbours,
        settings=settings.reranking,
    )
    stages.write_audit(result, target)
    write_audit_page(result, target / "index.html")
    lines = [models.reason.split(";")[0], result.report()]
    for row in result.copies.head(SHOWN).itertuples():
        pair = result.path(0, row.first), result.path(1, row.second)
        names = " and ".join(runs.printable(f"{p.parent.name}/{p.name}") for p in pair)
        lines.append(f"  {names}: {row.change}")
    if landmarks is not None:
        overlap = gldv2.overlap_audit(landmarks, result.overlap())
        lines.append(
            f"{len(overlap):,} of {landmarks['landmark_id'].nunique():,} landmarks have images of "
            f"places that {other} shows"
        )
        lines += overlap.head(SHOWN).to_string(index=False).split("\n") if len(overlap) else []
        runs.write_text(target / "landmarks.csv", overlap.to_csv(index=False))
    return "\n".join([*lines, f"pictures: {target / 'index.html'}", f"lists: {target}"])
