"""Loads images for the network: threads decode ahead, failures are recorded."""

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
from vitgal.features.selection import Frame
from vitgal.models.inference import UNTRAINED

AHEAD = 4  # images that each decoding thread may be ahead of the network
Failure = dict[str, str]  # {"name": key, "reason": why the image cannot be read}


@dataclass(frozen=True)
class ImageTask:
    """An image to describe.

    Attributes:
        key: the name that its descriptor or its features are stored under.
        path: the image file.
        box: the part to describe, (x0, y0, x1, y1) in pixels; None describes the whole image.
        is_query: a query must be readable; a database image may fail.
    """

    key: str
    path: Path
    box: tuple[float, ...] | None = None
    is_query: bool = False


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


def load_image(task: ImageTask, size: int, resize_mode: str) -> LoadedImage:
    """Decodes, crops and resizes an image.

    Args:
        size, resize_mode: as `vitgal.data.images.resize` takes them.
    Raises:
        ImageError: the file is damaged.
        ValueError: the box does not fit the image.
    """
    image = read_image(task.path)
    try:
        crop, box = crop_box(image, task.box)
    except ValueError as error:
        raise ValueError(f"{task.path}: {error}") from error
    return LoadedImage(resize(crop, size, resize_mode), (box, image.shape[:2]))


def prefetch(
    load: Callable[[ImageTask], LoadedImage], tasks: Iterable[ImageTask], threads: int
) -> Iterator[tuple[ImageTask, LoadedImage | ImageError]]:
    """Yields each task with its loaded image or its ImageError, in order.

    Threads load a few images ahead, because OpenCV releases Python's lock while it decodes.
    A ReadError is raised: the disk failed, not the image, and a later run may read it.

    Args:
        threads: 0 loads in the calling thread.
    """

    def attempt(task: ImageTask) -> LoadedImage | ImageError:
        """Loads one image, or returns the ImageError that tells why it cannot be used."""
        try:
            return load(task)
        except ReadError:
            raise
        except ImageError as error:
            return error

    if threads < 1:
        yield from ((task, attempt(task)) for task in tasks)
        return
    pending: deque[tuple[ImageTask, Future]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for task in tasks:
                pending.append((task, pool.submit(attempt, task)))
                if len(pending) > AHEAD * threads:
                    loaded_task, future = pending.popleft()
                    yield loaded_task, future.result()
            while pending:
                loaded_task, future = pending.popleft()
                yield loaded_task, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def refuse_failures(failures: Sequence[Failure], count: int, max_failed_share: float) -> None:
    """Raises StageError if more than the allowed fraction of `count` images failed."""
    if len(failures) <= max_failed_share * count:
        return
    examples = "; ".join(f"{failure['name']}: {failure['reason']}" for failure in failures[:3])
    more = f" and {len(failures) - 3} more" if len(failures) > 3 else ""
    raise runs.StageError(
        f"{len(failures)} of {count} images cannot be read, more than max_failed_share="
        f"{max_failed_share} allows ({examples}{more}); replace them, or raise max_failed_share "
        "to go on without them: what is done so far is kept"
    )


def refuse_failed_query(failures: Sequence[Failure]) -> None:
    """Raises StageError if there is any failure; `failures` are those of queries."""
    if failures:
        failure = failures[0]
        raise runs.StageError(
            f"the query image {failure['name']} cannot be read: {failure['reason']}; replace it "
            "(a query cannot be left out)"
        )


def report_failures(failures: Collection, count: int) -> None:
    """Prints how many images failed, if any; a reused stage prints the same."""
    if failures:
        print(f"{len(failures)} of {count} images could not be read: see failures.json")


def recorded_paths(
    run: Path, dataset: RetrievalDataset, model: Path | str | None = None
) -> dict[str, str | None]:
    """Lists the paths that a stage's manifest records, for the notebooks that follow.

    They stay valid if the run or the checkout is moved: a path in the run is recorded as None, for
    the run's own data and model; one in the checkout is relative to it.
    """
    paths = {"dataset_dir": dataset.folder, "distractors": dataset.distractors, "weights": model}
    return {name: path and _portable(run, path) for name, path in paths.items()}


def _portable(run: Path, path: Path | str) -> str | None:
    if str(path).startswith(UNTRAINED):
        return str(path)
    path = Path(path).absolute()
    if path.is_relative_to(run.absolute()):
        return None
    with contextlib.suppress(runs.StageError, ValueError):  # no checkout, or a path outside it
        return str(path.relative_to(runs.checkout()))
    return str(path)
