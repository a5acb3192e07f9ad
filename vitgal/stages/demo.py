"""The stage of the demo data: views of the bundled photographs, in the formats of real data."""

from collections.abc import Sequence
from pathlib import Path

from vitgal import runs
from vitgal.data.demo import benchmark
from vitgal.data.demo.photographs import (
    ATTRIBUTION,
    PHOTOGRAPHS,
    REGIONS,
    Photograph,
    read_photographs,
    split_photographs,
)
from vitgal.data.demo.views import write_views
from vitgal.data.gldv2 import image_path
from vitgal.settings.sections import DemoSettings


def make_demo(
    run: Path,
    settings: DemoSettings,
    *,
    photographs: str | Path = PHOTOGRAPHS,
    overwrite: bool = False,
) -> Path:
    """Makes the demo data, the stage `<run>/data`, and returns its folder.

    Every photograph of BENCHMARK_LANDMARKS gives one or two mild query views with a box around the
    landmark and BENCHMARK_VIEWS database views, from mild to strong; see `benchmark.label` for
    their labels. Every other photograph gives training views; its landmark is a class.

    Writes train.csv (id, landmark_id) and train/a/b/c/<id>.jpg, as Google Landmarks v2;
    benchmark/jpg/<name>.jpg and benchmark/gnd_demo.pkl, as ROxford; views.csv and
    benchmark/views.csv, the recipe of every view with its photograph's author, licence and source.

    photographs: folder with ATTRIBUTION.csv; a relative one lies in the checkout. Raises
    FileNotFoundError where it, its table or a photograph is missing, ValueError where a table is
    wrong, a photograph damaged or not of the listed size.
    """
    source = runs.resolve(photographs)
    listed = read_photographs(source)
    train, held_out = split_photographs(listed)
    folder = Path(run) / "data"
    if overwrite or not (folder / runs.MANIFEST).exists():
        for photograph in listed:
            photograph.read()  # refuses a damaged one before the stage begins
    parameters = settings.compared() | {"benchmark_views": benchmark.BENCHMARK_VIEWS}
    inputs = {"photographs": _photographs_input(source, listed)}
    with runs.stage(
        folder, "data", parameters=parameters, inputs=inputs, overwrite=overwrite
    ) as stage:
        if stage.finished:
            return stage.folder
        training = benchmark.training_recipes(train, settings)
        queries, database = benchmark.benchmark_recipes(held_out, settings)
        targets = [(view, f"train/{image_path(view.name)}") for view in training]
        targets += [(view, f"benchmark/jpg/{view.name}.jpg") for view in queries + database]
        write_views([(view, folder / path) for view, path in targets])
        benchmark.write_tables(folder, training, queries, database)
        outputs = [path for _, path in targets]
        return stage.finish([*outputs, *benchmark.TABLES], {"views": len(targets)})


def _photographs_input(folder: Path, photographs: Sequence[Photograph]) -> runs.Input:
    tables = [path for path in (folder / ATTRIBUTION, folder / REGIONS) if path.is_file()]
    files = [*tables, *(photograph.path for photograph in photographs)]
    names = [photograph.name for photograph in photographs]
    return runs.combined_input(
        [runs.file_input(path) for path in files],
        lambda *parts: {
            "tables": parts[: len(tables)],
            "photographs": list(zip(names, parts[len(tables) :], strict=True)),
        },
    )
