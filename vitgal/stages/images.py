"""The images that a stage describes: decoded ahead by threads, divided into shards; failures."""

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitgal import runs
from vitgal.data.images import ImageError, ReadError, crop_box, read_image, resize
from vitgal.data.revisited import RetrievalDataset
from vitgal.features import store
from vitgal.features.selection import Frame

AHEAD = 4  # images that each decoding thread may be ahead of the network
Failure = dict[str, str]  # {"name": key, "reason": why the image cannot be read}


@dataclass(frozen=True)
class ImageTask:
    """An image to describe, or its box (x0, y0, x1, y1) in pixels."""

    key: str  # the name that its descriptor or its features are stored under
    path: Path
    box: tuple[float, ...] | None = None
    is_query: bool = False  # it must be readable; a database image may fail


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """A network input (h, w, 3) uint8 RGB, and the crop of the photograph that it shows."""

    pixels: np.ndarray
    frame: Frame


LoadedImages = Iterable[tuple[ImageTask, LoadedImage | ImageError]]


def query_tasks(dataset: RetrievalDataset, crop: bool) -> list[ImageTask]:
    """Lists the queries of a dataset, each with its box if queries are cropped."""
    truth = dataset.ground_truth
    boxes = [tuple(map(float, box)) if crop else None for box in truth.boxes]
    queries = zip(truth.queries, dataset.query_paths, boxes, strict=True)
    return [ImageTask(name, path, box, is_query=True) for name, path, box in queries]


def benchmark_images(paths: Sequence[Path], dataset: RetrievalDataset) -> list[Path]:
    """Returns the files that hold a query or a labelled image of a benchmark, by content."""
    labelled = len(dataset.ground_truth.database)
    images = [*dataset.query_paths, *dataset.database_paths[:labelled]]
    sizes = {path.stat().st_size for path in images}
    suspects = [path for path in paths if path.stat().st_size in sizes]
    sizes = {path.stat().st_size for path in suspects}
    contents = {runs.fingerprint_file(path) for path in images if path.stat().st_size in sizes}
    return [path for path in suspects if runs.fingerprint_file(path) in contents]


def load_image(
    task: ImageTask, size: int, resize_mode: str, multiple: int | None = None
) -> LoadedImage:
    """Decodes, crops and resizes an image; the other arguments are those of `data.images.resize`.

    Raises ImageError for a damaged file, ValueError for a box that does not fit the image.
    """
    image = read_image(task.path)
    try:
        crop, box = crop_box(image, task.box)
    except ValueError as error:
        raise ValueError(f"{task.path}: {error}") from error
    return LoadedImage(resize(crop, size, resize_mode, multiple), (box, image.shape[:2]))


def prefetch(
    load: Callable[[ImageTask], LoadedImage], tasks: Iterable[ImageTask], threads: int
) -> Iterator[tuple[ImageTask, LoadedImage | ImageError]]:
    """Yields each task with its loaded image or its ImageError, in order.

    Threads load a few images ahead, because OpenCV releases Python's lock while it decodes; with 0
    threads the caller loads. A ReadError is raised: the disk failed, not the image.
    """

    def attempt(task: ImageTask) -> tuple[ImageTask, LoadedImage | ImageError]:
        """Loads one image, or returns why it cannot be used."""
        try:
            return task, load(task)
        except ReadError:
            raise
        except FileNotFoundError:  # it was there when the stage began
            return task, ImageError(task.path, "the file is gone")
        except ImageError as error:
            return task, error

    if threads < 1:
        yield from map(attempt, tasks)
        return
    pending: deque[Future] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for task in tasks:
                pending.append(pool.submit(attempt, task))
                if len(pending) > AHEAD * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def refuse_failures(failures: Sequence[Failure], count: int, max_failed_share: float) -> None:
    """Raises StageError if more than the allowed fraction of `count` images failed."""
    if len(failures) <= max_failed_share * count:
        return
    examples = "; ".join(f"{failure['name']}: {failure['reason']}" for failure in failures[:3])
    more = f" and {len(failures) - 3} more" if len(failures) > 3 else ""
    raise runs.StageError(
        f"{len(failures)} of {count} images cannot be read, more than max_failed_share="
        f"{max_failed_share} allows ({examples}{more}); replace them, or raise max_failed_share "
        "to continue without them: what is done so far is kept"
    )


def refuse_failed_query(failures: Sequence[Failure]) -> None:
    """Raises StageError if there is any failure; `failures` are those of queries."""
    for failure in failures:
        raise runs.StageError(
            f"the query image {failure['name']} cannot be read: {failure['reason']}; replace it "
            "(a query cannot be left out)"
        )


def report_failures(failures: Collection, count: int) -> None:
    """Prints how many images failed, if any; a reused stage prints the same."""
    if failures:
        print(f"{len(failures)} of {count} images could not be read: see failures.json")


def recorded_paths(
    run: Path,
    dataset: RetrievalDataset,
    model: Path | str | None = None,
    refine_set: Path | None = None,
) -> dict[str, str | None]:
    """Lists the paths that a stage's manifest records for the notebooks that follow.

    They stay valid when the run or the checkout is moved: a path in the run is None, for the run's
    own data and model; one in the checkout is relative to it.
    """
    paths = {"dataset_dir": dataset.folder, "distractors": dataset.distractors, "weights": model}
    paths |= {} if refine_set is None else {"refine_set": refine_set}
    return {name: path and _portable(run, path) for name, path in paths.items()}


def _portable(run: Path, path: Path | str) -> str | None:
    file = runs.weights_path(path)
    if file is None:
        return str(path)
    if str(path).startswith(runs.TIMM):
        network = str(path).partition("@")[0]
        portable = _portable(run, file)
        return f"{network}@{file.absolute() if portable is None else portable}"
    path = Path(path).absolute()
    if path.is_relative_to(run.absolute()):
        return None
    with contextlib.suppress(runs.StageError):  # an installation without notebooks
        for top in (runs.checkout(), runs.bundled_folder()):
            if path.is_relative_to(top):
                return str(path.relative_to(top))
    return str(path)


@dataclass(frozen=True, eq=False)
class ShardTask:
    """A shard to write: its folder, its images sorted by key, and the format of their features."""

    folder: Path
    images: Sequence[ImageTask]
    format: store.ShardFormat

    @property
    def keys(self) -> list[str]:
        """The keys of the images."""
        return [image.key for image in self.images]

    def written(self) -> store.Shard | None:
        """Opens the shard if it is complete on disk and every checksum is right, else None."""
        return store.whole_shard(self.folder, self.keys, self.format)

    def refuse_failed_query(self, failures: Sequence[Failure]) -> None:
        """Raises StageError if one of the failed images is a query."""
        queries = {image.key for image in self.images if image.is_query}
        refuse_failed_query([failure for failure in failures if failure["name"] in queries])

    def refuse_other_precision(self) -> None:
        """Raises StageError if the shard on disk was extracted in another precision."""
        try:
            settings = store.Shard.open(self.folder).header["settings"]
        except store.StoreError:  # missing or damaged: it will be written again
            return
        wanted = self.format.settings["precision"]
        precision = settings.get("precision", wanted)
        if precision != wanted:
            raise runs.StageError(
                f"{self.folder} was made in {precision}, and here it would be {wanted}: "
                f"{store.PRECISION_REMEDY}"
            )


def shard_tasks(
    folder: Path, images: Sequence[ImageTask], shard_size: int, shard_format: store.ShardFormat
) -> list[ShardTask]:
    """Divides images into the shards of a store: a fixed partition of the sorted keys.

    Without images there is one empty shard.
    """
    by_key = {image.key: image for image in images}
    parts = store.partition(by_key, shard_size) or [[]]
    folders = [store.shard_folder(folder, index, len(parts)) for index in range(len(parts))]
    return [
        ShardTask(shard, [by_key[key] for key in keys], shard_format)
        for shard, keys in zip(folders, parts, strict=True)
    ]
