"""The demo data: simulated views of the bundled photographs, laid out as the real data sets are."""

from collections.abc import Sequence
from pathlib import Path

from vitgal import runs
from vitgal.data.demo.benchmark import (
    benchmark_recipes,
    jpg_path,
    train_path,
    training_recipes,
    write_tables,
)
from vitgal.data.demo.photographs import (
    ATTRIBUTION,
    PHOTOGRAPHS,
    REGIONS,
    TABLES,
    Photograph,
    check_photographs,
    read_photographs,
    split_photographs,
)
from vitgal.data.demo.rendering import write_views


def make_demo(
    run: Path,
    *,
    photographs: str | Path = PHOTOGRAPHS,
    seed: int = 0,
    view_size: int = 320,
    train_views: int = 12,
    benchmark_views: int = 8,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Makes the demo data set, the stage `<run>/data`, and returns its folder.

    Every photograph of BENCHMARK_LANDMARKS gives one mild query view with a box around the landmark
    and `benchmark_views` database views, from mild to strong; the last of them looks past the
    landmark. Every other photograph gives `train_views` training views; its landmark is a class.
    For a query, a database view is (see `label`)

        easy    same photograph, at least 60 % of the landmark visible, change at most 0.45
        hard    same photograph, at least 15 % visible, not easy;
                or another photograph of the landmark, at least 50 % visible and at
                most 0.6 strong
        junk    less than that visible; or a landmark at the same place (SAME_PLACE)

    where the visible part is the share of the landmark's box that lies inside the view and is not
    behind its occluder, and the change is the weighted sum of tilt, rotation, zoom, night, loss of
    colour, exposure, white balance and blur in `_strength`.

    Args:
        photographs: folder with ATTRIBUTION.csv; a relative one lies in the checkout.
        view_size: longer side of every view in pixels.
    Writes:
        train.csv (id, landmark_id), train/a/b/c/<id>.jpg as Google Landmarks v2; views.csv recipes
        benchmark/jpg/<name>.jpg, benchmark/gnd_demo.pkl as ROxford; benchmark/views.csv recipes,
        with `label` as seen from the same photograph's query. Both views.csv name every view's
        photograph, author, licence and source.
    Raises:
        FileNotFoundError: the folder, its table or a photograph is missing.
        ValueError: a table is wrong, a photograph unreadable or not of the size that it states.
    """
    if min(view_size, train_views, benchmark_views) < 1:
        raise ValueError("view_size, train_views and benchmark_views must be at least 1")
    folder = runs.resolve(photographs)
    listed = read_photographs(folder)
    parameters = {
        "seed": seed,
        "view_size": view_size,
        "train_views": train_views,
        "benchmark_views": benchmark_views,
    }
    inputs = {"photographs": _fingerprint(folder, listed)}
    parts = split_photographs(listed)
    where = Path(run) / "data"
    if overwrite or not (where / runs.MANIFEST).exists():
        check_photographs(listed)
    with runs.stage(
        where, "data", parameters=parameters, inputs=inputs, overwrite=overwrite
    ) as stage:
        if not stage.finished:
            outputs = _write_demo(stage.folder, *parts, progress=progress, **parameters)
            stage.finish(outputs, views=len(outputs) - len(TABLES))
    return stage.folder


def _write_demo(
    folder: Path,
    train: Sequence[Photograph],
    benchmark: Sequence[Photograph],
    *,
    seed: int,
    view_size: int,
    train_views: int,
    benchmark_views: int,
    progress: bool,
) -> list[Path]:
    drawn = {"seed": seed, "view_size": view_size}
    training = training_recipes(train, train_views, **drawn)
    queries, database = benchmark_recipes(benchmark, benchmark_views, **drawn)
    targets = [(view, train_path(view.name)) for view in training]
    targets += [(view, jpg_path(view.name)) for view in queries + database]
    write_views([(view, folder / path) for view, path in targets], progress=progress)
    write_tables(folder, training, queries, database)
    return [path for _, path in targets] + [Path(name) for name in TABLES]


def _fingerprint(folder: Path, photographs: Sequence[Photograph]) -> str:
    tables = [path for path in (folder / ATTRIBUTION, folder / REGIONS) if path.is_file()]
    return runs.fingerprint(
        {
            "tables": [runs.fingerprint_file(path) for path in tables],
            "photographs": [
                [photograph.name, runs.fingerprint_file(photograph.path)]
                for photograph in photographs
            ],
        }
    )
