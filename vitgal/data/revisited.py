"""ROxford5k, RParis6k and the one million distractors: ground truth, image lists, protocols.

A data set in this layout is a folder with `jpg/` and `gnd_<name>.pkl`; any benchmark written so
(the demo, a user's own) is read by the same code. Source: Radenovic et al., "Revisiting Oxford and
Paris", CVPR 2018, and the files published with it.
"""

import functools
import os
import pickle
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitgal import runs

PROTOCOLS = ("easy", "medium", "hard")
LABELS = ("easy", "hard", "junk")
DISTRACTORS = "revisitop1m"
DOWNLOADS = ("roxford5k", "rparis6k", DISTRACTORS)
EXTENSION = ".jpg"  # the lists of ROxford and RParis leave it out, the distractors' list does not
PICKLE_PROTOCOL = 4  # fixed, so that the same ground truth is the same bytes under every Python
SHOWN = 3  # missing or repeated names that an error spells out


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Which database images show each query's landmark, and how hard they are to recognise.

    name: the data set's name.  database: N names.  queries: Q names.
    boxes: (Q, 4) float64, (x0, y0, x1, y1) in pixels of the stored query image.
    easy, hard, junk: per query a rising int64 array of zero-based indices into `database`; no
    index is in two of them. What is in none is negative.
    """

    name: str
    database: list[str]
    queries: list[str]
    boxes: np.ndarray
    easy: list[np.ndarray]
    hard: list[np.ndarray]
    junk: list[np.ndarray]

    @property
    def fingerprint(self) -> str:
        """A fingerprint of names, boxes and labels (not of the images)."""
        return runs.fingerprint(
            [getattr(self, key) for key in ("database", "queries", "boxes")]
            + [getattr(self, key) for key in LABELS]
        )


@dataclass(frozen=True, eq=False)
class RetrievalDataset:
    """A benchmark whose images are all there: names and paths in the order of the indices.

    `database` starts with the ground truth's images; the distractors follow in their list's order.
    """

    name: str
    ground_truth: GroundTruth
    database: list[str]
    database_paths: list[Path]
    query_paths: list[Path]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A fingerprint of ground truth, image names and image content; reads every file's ends."""
        images = runs.fingerprint_images(
            [*self.ground_truth.queries, *self.database], [*self.query_paths, *self.database_paths]
        )
        return runs.fingerprint([self.ground_truth.fingerprint, images])


def positives(ground_truth: GroundTruth, protocol: str) -> list[np.ndarray]:
    """Per query the images that count as correct: easy; easy and hard (medium); or hard."""
    return _joined(
        ground_truth, {"easy": ("easy",), "medium": ("easy", "hard"), "hard": ("hard",)}, protocol
    )


def ignored(ground_truth: GroundTruth, protocol: str) -> list[np.ndarray]:
    """Per query the images that count neither way, as if they were not in the database."""
    return _joined(
        ground_truth,
        {"easy": ("hard", "junk"), "medium": ("junk",), "hard": ("easy", "junk")},
        protocol,
    )


def labelled(ground_truth: GroundTruth) -> list[np.ndarray]:
    """Per query every easy, hard and junk image: those whose ranks the scores depend on."""
    return _joined(ground_truth, {"all": LABELS}, "all")


def _joined(ground_truth: GroundTruth, parts: dict, protocol: str) -> list[np.ndarray]:
    if protocol not in parts:
        raise ValueError(f"unknown protocol {protocol!r}; use one of {', '.join(parts)}")
    lists = [getattr(ground_truth, part) for part in parts[protocol]]
    return [np.sort(np.concatenate(arrays)) for arrays in zip(*lists, strict=True)]


class _BuiltinsOnly(pickle.Unpickler):
    """Unpickles lists, dicts, strings and numbers; a pickle runs code only by naming a class."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_ground_truth(path: str | os.PathLike) -> GroundTruth:
    """Reads `gnd_<name>.pkl` in the published layout, without running anything it holds.

    The pickle is a dict with `imlist`, `qimlist` (names) and `gnd` (per query `bbx`, `easy`,
    `hard`, `junk`). Empty label lists are allowed; boxes may be fractional.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not whole, asks for any class or function, lacks a key, or holds a wrong
            type, an index outside the database, an image with two labels for one query, a name
            twice, or a box that is negative or empty; the message names file, query and value.
    """
    path = Path(path)
    try:
        with open(path, "rb") as handle:
            content = _BuiltinsOnly(handle).load()
    except FileNotFoundError:
        remedy = _remedy(path.stem.removeprefix("gnd_"))
        raise FileNotFoundError(f"there is no ground truth file {path}; {remedy}") from None
    except Exception as error:  # a damaged pickle can raise anything; all of it is one refusal
        raise ValueError(
            f"{path} is refused as ground truth: {error or type(error).__name__}; the published "
            "files hold lists, names and numbers alone, so get the file again from its publisher"
        ) from error
    try:
        ground_truth = _from_published(path.stem.removeprefix("gnd_"), content)
        check_ground_truth(ground_truth)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return ground_truth


def write_ground_truth(path: str | os.PathLike, ground_truth: GroundTruth) -> Path:
    """Writes the published pickle layout (builtins only, same content same bytes), atomically.

    Raises ValueError where `load_ground_truth` would refuse the content.
    """
    check_ground_truth(ground_truth)
    entries = [
        {"bbx": box.tolist()}
        | {label: getattr(ground_truth, label)[q].tolist() for label in LABELS}
        for q, box in enumerate(ground_truth.boxes)
    ]
    # A pickle writes an object it has met before as a reference: equal names must be one object.
    content = {
        "gnd": entries,
        "imlist": [sys.intern(str(name)) for name in ground_truth.database],
        "qimlist": [sys.intern(str(name)) for name in ground_truth.queries],
    }
    with runs.atomic(Path(path)) as temporary:
        temporary.write_bytes(pickle.dumps(content, protocol=PICKLE_PROTOCOL))
    return Path(path)


def check_ground_truth(ground_truth: GroundTruth) -> None:
    """Raises ValueError, naming query and value, where the parts do not fit together."""
    gt = ground_truth
    count = len(gt.queries)
    for role, names in (("database", gt.database), ("query", gt.queries)):
        _refuse_repeated(names, f"{role} list")
    if np.shape(gt.boxes) != (count, 4):
        raise ValueError(f"{count} queries need boxes ({count}, 4), not {np.shape(gt.boxes)}")
    for label in LABELS:
        if len(getattr(gt, label)) != count:
            raise ValueError(f"{count} queries, but {len(getattr(gt, label))} {label} lists")
    for q, query in enumerate(gt.queries):
        _check_box(gt.boxes[q], f"query {q} ({query})")
        _check_labels([getattr(gt, label)[q] for label in LABELS], len(gt.database), q, query)


def _check_box(box: np.ndarray, query: str) -> None:
    if not np.isfinite(box).all() or (box < 0).any():
        raise ValueError(f"{query} has the box {box.tolist()}: pixels cannot be negative or nan")
    x0, y0, x1, y1 = box.astype(np.int64)  # published: boxes are truncated to whole pixels
    if x1 <= x0 or y1 <= y0:
        raise ValueError(
            f"{query} has the box {box.tolist()}, which holds no pixel; (x0, y0, x1, y1) with "
            "x0 < x1 and y0 < y1 is expected"
        )


def _check_labels(lists: list[np.ndarray], size: int, q: int, query: str) -> None:
    for label, indices in zip(LABELS, lists, strict=True):
        outside = indices[(indices < 0) | (indices >= size)]
        if outside.size:
            raise ValueError(
                f"query {q} ({query}) has the {label} index {outside[0]}, but the database has "
                f"{size} images (0 to {size - 1})"
            )
    found, times = np.unique(np.concatenate(lists), return_counts=True)
    if (times > 1).any():
        raise ValueError(
            f"query {q} ({query}) labels the database image {found[times > 1][0]} twice; each is "
            "easy, hard, junk or none of them"
        )


def _from_published(name: str, content: Any) -> GroundTruth:
    missing = [key for key in ("imlist", "qimlist", "gnd") if not _has(content, key)]
    if missing:
        raise ValueError(f"no {' and no '.join(missing)} in it; it is not a ground truth file")
    queries = _names(content["qimlist"], "qimlist")
    entries = content["gnd"]
    if not isinstance(entries, (list, tuple)) or len(entries) != len(queries):
        raise ValueError(f"gnd must be a list with one entry for each of {len(queries)} queries")
    where = [f"query {q} ({query})" for q, query in enumerate(queries)]
    labels = {
        label: [_indices(entry, label, at) for entry, at in zip(entries, where, strict=True)]
        for label in LABELS
    }
    boxes = [_box(entry, at) for entry, at in zip(entries, where, strict=True)]
    return GroundTruth(
        name=name,
        database=_names(content["imlist"], "imlist"),
        queries=queries,
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        **labels,
    )


def _has(content: Any, key: str) -> bool:
    return isinstance(content, dict) and key in content


def _names(value: Any, key: str) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, str) and x for x in value):
        raise ValueError(f"{key} must be a list of image names")
    return list(value)


def _numbers(entry: Any, key: str, where: str, kinds: tuple[type, ...]) -> list:
    if not _has(entry, key):
        raise ValueError(f"{where} has no {'box (bbx)' if key == 'bbx' else key + ' list'}")
    value = entry[key]
    right = isinstance(value, (list, tuple)) and all(
        isinstance(x, kinds) and not isinstance(x, bool) for x in value
    )
    if not right:
        raise ValueError(f"{where}: {key} must be a list of numbers, not {str(value)[:60]}")
    return list(value)


def _box(entry: Any, where: str) -> list[float]:
    box = _numbers(entry, "bbx", where, (int, float))
    if len(box) != 4:
        raise ValueError(f"{where} has a box of {len(box)} numbers; 4 are needed: x0, y0, x1, y1")
    return box


def _indices(entry: Any, label: str, where: str) -> np.ndarray:
    try:
        return np.sort(np.array(_numbers(entry, label, where, (int,)), dtype=np.int64))
    except OverflowError:
        raise ValueError(f"{where}: {label} holds an index beyond any database") from None


def _refuse_repeated(names: Sequence[str], what: str) -> None:
    if len(set(names)) != len(names):
        repeated = [name for name, times in Counter(names).items() if times > 1]
        raise ValueError(f"the {what} names an image twice: {_some(repeated)}")


def open_dataset(
    name: str,
    folder: str | os.PathLike,
    *,
    distractors: str | os.PathLike | None = None,
    distractor_list: str | os.PathLike | None = None,
) -> RetrievalDataset:
    """Opens a benchmark folder and checks that every image it lists is there (none is decoded).

    Args:
        folder: holds `jpg/<image>.jpg` and `gnd_<name>.pkl`.
        distractors: a folder with `jpg/` (sub-folders and all) whose images follow the database.
        distractor_list: one path below `jpg/` a line, by default `revisitop1m.txt` in
            `distractors`; it fixes the order, hence the indices in every ranking.
    Raises:
        FileNotFoundError: the folder, the ground truth, the list or an image is missing; the first
            few missing images are named, and how many there are.
        ValueError: the ground truth is refused (`load_ground_truth`), a name leads out of the
            folder, or an image is listed twice.
    """
    # NOTE the published code walks the distractors with an unsorted os.listdir: its indices depend
    # on the file system, and saved rankings do not fit another machine.
    folder = Path(folder)
    images = _image_folder(folder, name)
    ground_truth = load_ground_truth(folder / f"gnd_{name}.pkl")
    both = sorted(set(ground_truth.queries) & set(ground_truth.database))
    if both:
        raise ValueError(
            f"{name}: query images are in the database as well ({_some(both)}); features are kept "
            "by name, so a query's crop needs a name (a copy of the file) of its own"
        )
    database_paths = _paths(images, ground_truth.database, EXTENSION, name)
    query_paths = _paths(images, ground_truth.queries, EXTENSION, name)
    database = list(ground_truth.database)
    if distractors is not None:
        names, paths = _distractors(Path(distractors), distractor_list)
        database, database_paths = database + names, database_paths + paths
        _refuse_repeated([*database, *ground_truth.queries], "list with distractors")
    return RetrievalDataset(name, ground_truth, database, database_paths, query_paths)


def _distractors(folder: Path, listed: str | os.PathLike | None) -> tuple[list[str], list[Path]]:
    images = _image_folder(folder, DISTRACTORS)
    listed = Path(listed) if listed is not None else folder / f"{DISTRACTORS}.txt"
    if not listed.is_file():
        raise FileNotFoundError(
            f"there is no list of distractors {listed}; {_remedy(DISTRACTORS)}, or name another "
            "list (one path below jpg/ a line) as distractor_list"
        )
    lines = listed.read_text(encoding="utf-8").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    return names, _paths(images, names, "", DISTRACTORS)


def _image_folder(folder: Path, name: str) -> Path:
    if not (folder / "jpg").is_dir():
        what = "has no folder jpg/" if folder.is_dir() else "is not there"
        raise FileNotFoundError(f"the folder {folder} {what}; {_remedy(name)}")
    return folder / "jpg"


def _paths(images: Path, names: Iterable[str], extension: str, dataset: str) -> list[Path]:
    paths = []
    missing = []
    present: dict[str, set[str]] = {}  # of each folder its files, listed once
    for name in names:
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{dataset} lists {name!r}, which leads out of {images}")
        folder, file = os.path.split(name + extension)
        paths.append(images / (name + extension))
        if folder not in present:
            present[folder] = _files(images / folder)
        if file not in present[folder]:
            missing.append(name + extension)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} images that {dataset} lists are missing in {images}: "
            f"{_some(missing)}; {_remedy(dataset)}"
        )
    return paths


def _files(folder: Path) -> set[str]:
    """The names of a folder's files; none where there is no such folder.

    Asking for a million distractors one by one would take minutes on a network disk.
    """
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _remedy(name: str) -> str:
    if name in DOWNLOADS:
        return f"`vitgal download {name}` brings it"
    return f"a benchmark folder holds jpg/ with every listed image and gnd_{name}.pkl"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


class QueryError(runs.UserError, ValueError):
    """There is no such query; the message states the range."""


def check_query(ground_truth: GroundTruth, query: int) -> int:
    """The query's index as it is; QueryError that states the range where there is no such query."""
    if not 0 <= query < len(ground_truth.queries):
        raise QueryError(
            f"query_index {query}: {ground_truth.name} has the queries 0 to "
            f"{len(ground_truth.queries) - 1}"
        )
    return query
