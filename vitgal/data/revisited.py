"""ROxford5k, RParis6k and the one million distractors: ground truth, image lists, protocols.

A benchmark in this layout is a folder with `jpg/` and `gnd_<name>.pkl`; the same code reads the
demo's and a user's own. Source: Radenovic et al., "Revisiting Oxford and Paris", CVPR 2018, and the
files published with it.
"""

import contextlib
import io
import os
import pickle
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vitgal import runs

PROTOCOLS = ("easy", "medium", "hard")
LABELS = ("easy", "hard", "junk")
POSITIVES = {"easy": ("easy",), "medium": ("easy", "hard"), "hard": ("hard",)}
IGNORED = {"easy": ("hard", "junk"), "medium": ("junk",), "hard": ("easy", "junk")}
DISTRACTORS = "revisitop1m"
DOWNLOADS = ("roxford5k", "rparis6k", DISTRACTORS)
EXTENSION = ".jpg"  # the lists of ROxford and RParis omit it, the distractors' list does not
PICKLE_PROTOCOL = 4  # fixed, so that the same ground truth is the same bytes under every Python
MOST_LABELS = 20_000_000  # of all queries; a small file can refer to one list many times
LONGEST_NAME = 4096  # of an image


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Database images that show each query's landmark, and how hard they are to recognise.

    `database` and `queries` are N and Q image names. `boxes` (Q, 4) float64 is (x0, y0, x1, y1) in
    pixels of the stored query image. `easy`, `hard` and `junk` are per query a rising int64 array
    of indices into `database`; no index is in two of them, an image in none of them is negative.
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
        """A fingerprint of names, boxes and labels, not of the images."""
        return runs.fingerprint(
            [self.database, self.queries, self.boxes, self.easy, self.hard, self.junk]
        )


class ImagePaths(Sequence[Path]):
    """Paths (N,) that are made when they are asked for: a million of them would take 400 MB."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        """Returns one path; for a slice a list of them."""
        texts = self.texts[index]
        return Path(texts) if isinstance(texts, str) else [*map(Path, texts)]


@dataclass(frozen=True, eq=False)
class RetrievalDataset:
    """A benchmark whose images all exist: names and paths in the order of the indices.

    database: the ground truth's images, then the distractors in their list's order. verify: whether
    a stage reads the images again even where sizes and times are the same. stamps: the stamp of
    very many images, until the first stage has used it.
    """

    name: str
    ground_truth: GroundTruth
    database: list[str]
    database_paths: Sequence[Path]
    query_paths: list[Path]
    folder: Path | None = None
    distractors: Path | None = None
    verify: bool = False
    stamps: list[str] = field(default_factory=list, repr=False)

    @property
    def as_input(self) -> runs.Input:
        """The input of a stage that reads the images; they are read only where they changed."""

        def images() -> runs.Input:
            database = getattr(self.database_paths, "texts", self.database_paths)
            names = [*self.ground_truth.queries, *self.database]
            return runs.images_input(names, [*self.query_paths, *database])

        stamped = runs.Input(
            lambda: (self.stamps or [images().stamp()]).pop(),
            lambda: images().fingerprint(),
            self.verify,
        )
        return runs.combined_input([stamped], lambda part: [self.ground_truth.fingerprint, part])


def positives(ground_truth: GroundTruth, protocol: str) -> list[np.ndarray]:
    """Returns per query the images that count as correct: (P,) int64, rising."""
    return _images_with_labels(ground_truth, POSITIVES, protocol)


def ignored(ground_truth: GroundTruth, protocol: str) -> list[np.ndarray]:
    """Returns per query the images that are taken out of rankings: (P,) int64, rising."""
    return _images_with_labels(ground_truth, IGNORED, protocol)


def labelled(ground_truth: GroundTruth) -> list[np.ndarray]:
    """Returns per query every easy, hard and junk image: (P,) int64, rising."""
    return _images_with_labels(ground_truth, {"all": LABELS}, "all")


def relevance_labels(ground_truth: GroundTruth, query: int, images: Sequence[int]) -> list[str]:
    """Returns "easy", "hard", "junk" or "negative" (in no list) for database images by index."""
    labels = {
        int(index): label
        for label in ("junk", "hard", "easy")
        for index in getattr(ground_truth, label)[query]
    }
    return [labels.get(int(image), "negative") for image in images]


def _images_with_labels(
    ground_truth: GroundTruth, labels: dict[str, tuple[str, ...]], protocol: str
) -> list[np.ndarray]:
    if protocol not in labels:
        raise ValueError(f"unknown protocol {protocol!r}; use one of {', '.join(labels)}")
    lists = [getattr(ground_truth, label) for label in labels[protocol]]
    return [np.sort(np.concatenate(arrays)) for arrays in zip(*lists, strict=True)]


class _BuiltinsOnly(pickle._Unpickler):
    """Unpickles only lists, tuples, dicts with text as keys, text and numbers.

    The base class is the one in Python: a damaged index makes the compiled one allocate 34 GB.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Refuses every class and function."""
        if module.split(".")[0] == "numpy":
            raise pickle.UnpicklingError("it holds numpy arrays or numbers, not lists and numbers")
        raise pickle.UnpicklingError(
            f"it refers to {runs.printable(module)}.{runs.printable(name)}"
        )

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it holds more than lists, dicts, text and numbers")

    def _set_items(self, items: list) -> None:
        """Adds keys and values, in turn, to the dict on top of the stack."""
        if not all(type(key) is str for key in items[::2]):  # to hash a tuple can take years
            self._refuse()
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _make_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    # The opcodes refused here can allocate any amount of memory, or hash the items of a set.
    dispatch = pickle._Unpickler.dispatch | {
        **dict.fromkeys(pickle.BYTEARRAY8 + pickle.NEXT_BUFFER + pickle.READONLY_BUFFER, _refuse),
        **dict.fromkeys(pickle.EMPTY_SET + pickle.ADDITEMS + pickle.FROZENSET, _refuse),
        pickle.DICT[0]: _make_dict,
        pickle.SETITEMS[0]: lambda self: self._set_items(self.pop_mark()),
        pickle.SETITEM[0]: lambda self: self._set_items([self.stack.pop(-2), self.stack.pop()]),
    }


def load_ground_truth(path: str | os.PathLike) -> GroundTruth:
    """Reads `gnd_<name>.pkl` in the published layout without running code from the file.

    The pickle is a dict with `imlist`, `qimlist` (names) and `gnd` (per query `bbx`, `easy`,
    `hard`, `junk`). Empty label lists are allowed; boxes may be fractional. Raises
    FileNotFoundError, and ValueError, naming file, query and value, where it is damaged, refers to
    a class or function, or fails `check_ground_truth`.
    """
    path = Path(path)
    name = path.stem.removeprefix("gnd_")
    try:
        # From memory: a read of more than the file holds allocates nothing.
        content = _BuiltinsOnly(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no ground truth file {path}; {_remedy(name)}") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = runs.printable(str(error)[:200] or type(error).__name__)
        raise ValueError(
            f"{path} is refused as ground truth: {reason}; get a published file again from its "
            "publisher, and write your own with vitgal.data.write_ground_truth, which takes arrays"
        ) from None
    try:
        ground_truth = _parse(name, content)
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
    # Interned: a pickle's bytes depend on whether equal names are one object.
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
    queries, boxes = ground_truth.queries, ground_truth.boxes
    _refuse_repeated(ground_truth.database, "database list")
    _refuse_repeated(queries, "query list")
    if np.shape(boxes) != (len(queries), 4):
        raise ValueError(
            f"{len(queries)} queries need boxes ({len(queries)}, 4), not {np.shape(boxes)}"
        )
    lists = [getattr(ground_truth, label) for label in LABELS]
    for label, arrays in zip(LABELS, lists, strict=True):
        if len(arrays) != len(queries):
            raise ValueError(f"{len(queries)} queries, but {len(arrays)} {label} lists")
    for q, (query, box, *arrays) in enumerate(zip(queries, boxes, *lists, strict=True)):
        if fault := _box_fault(box) or _label_fault(arrays, len(ground_truth.database)):
            raise ValueError(f"query {q} ({runs.printable(query)}) {fault}")


def _box_fault(box: np.ndarray) -> str | None:
    if not np.isfinite(box).all() or (box < 0).any():
        return f"has the box {box.tolist()}: pixels cannot be negative or nan"
    x0, y0, x1, y1 = np.trunc(box)  # as published: boxes are truncated to integers
    if x1 <= x0 or y1 <= y0:
        rule = "(x0, y0, x1, y1) needs x0 < x1 and y0 < y1"
        return f"has the box {box.tolist()}, which holds no pixel; {rule}"
    return None


def _label_fault(arrays: list[np.ndarray], size: int) -> str | None:
    for label, indices in zip(LABELS, arrays, strict=True):
        outside = indices[(indices < 0) | (indices >= size)]
        if outside.size:
            images = f"{size} images (0 to {size - 1})"
            return f"has the {label} index {outside[0]}, but the database has {images}"
    images, counts = np.unique(np.concatenate(arrays), return_counts=True)
    if (counts > 1).any():
        twice = f"labels the database image {images[counts > 1][0]} twice"
        return f"{twice}; an image is easy, hard, junk or none of them"
    return None


def _parse(name: str, content: Any) -> GroundTruth:
    keys = ("imlist", "qimlist", "gnd")
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"no {' and no '.join(missing)} in it; it is not a ground truth file")
    for key in keys[:2]:
        names = content[key]
        if not _is_list(names, str) or not all(0 < len(name) < LONGEST_NAME for name in names):
            raise ValueError(f"{key} must be a list of image names")
    database, queries, entries = (content[key] for key in keys)
    if not _is_list(entries, dict) or len(entries) != len(queries):
        raise ValueError(f"gnd must be a list with one dict for each of {len(queries)} queries")
    labels = (entry.get(label) for entry in entries for label in LABELS)
    if sum(len(images) for images in labels if isinstance(images, list)) > MOST_LABELS:
        raise ValueError(f"gnd holds more than {MOST_LABELS:,} labels")
    boxes, lists = [], {label: [] for label in LABELS}
    for q, (query, entry) in enumerate(zip(queries, entries, strict=True)):
        try:
            box = entry.get("bbx")
            if not _is_list(box, (int, float)) or len(box) != 4:
                needed = "a box (bbx) of 4 numbers: x0, y0, x1, y1"
                raise ValueError(f"needs {needed}; not {runs.short(box)}")
            boxes.append(np.array(box, np.float64))
            for label in LABELS:
                images = entry.get(label)
                if not _is_list(images, int):
                    raise ValueError(f"needs a list {label} of integers, not {runs.short(images)}")
                lists[label].append(np.sort(np.array(images, np.int64)))
        except (OverflowError, ValueError) as error:
            fault = error if isinstance(error, ValueError) else "holds a number beyond any image"
            raise ValueError(f"query {q} ({runs.printable(query)}) {fault}") from None
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    labels = lists["easy"], lists["hard"], lists["junk"]
    return GroundTruth(name, list(database), list(queries), boxes, *labels)


def _is_list(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )


def _refuse_repeated(names: Sequence[str], description: str) -> None:
    different = set()
    for start in range(0, len(names), runs.MANY):  # other threads run in between
        different.update(names[start : start + runs.MANY])
    if len(different) != len(names):
        repeated = [name for name, count in Counter(names).items() if count > 1]
        raise ValueError(f"the {description} names an image twice: {runs.abbreviate(repeated)}")


def open_dataset(
    name: str,
    folder: str | os.PathLike,
    *,
    distractors: str | os.PathLike | None = None,
    verify: bool = False,
) -> RetrievalDataset:
    """Opens a benchmark folder and checks that every listed image exists; none is decoded.

    `folder` holds `jpg/<image>.jpg` and `gnd_<name>.pkl`. `distractors` is a folder with `jpg/`,
    whose images follow the database, and `revisitop1m.txt`, a path below `jpg/` a line: the list's
    order fixes the indices in every ranking. `verify`: stages read all images again, even where
    their sizes and times have not changed.

    Raises FileNotFoundError where anything is missing, and ValueError where the ground truth is
    refused, a name leads out of the folder, or an image is listed twice.
    """
    # NOTE the published code walks the distractors with an unsorted os.listdir: its indices depend
    # on the file system, and saved rankings do not fit another machine.
    folder = Path(folder)
    images = _image_folder(folder, name)
    ground_truth = load_ground_truth(folder / f"gnd_{name}.pkl")
    common = sorted(set(ground_truth.queries) & set(ground_truth.database))
    if common:
        raise ValueError(
            f"{name}: query images are in the database as well ({runs.abbreviate(common)}); "
            "features are kept by name, so the query needs a copy of the file under another name"
        )
    listed = (ground_truth.queries, ground_truth.database)
    parts = [_Images(images, names, EXTENSION, name) for names in listed]
    if distractors is not None:
        distractors = Path(distractors)
        parts.append(_distractors(distractors))
    many = sum(len(part.names) for part in parts) >= runs.MANY
    with ThreadPoolExecutor() as pool:
        facts = pool.map(_Images.facts, parts if many else ())  # begun before names are checked
        names = [image for part in parts for image in part.names]
        queries, *database = (part.paths() for part in parts)
        paths, query_paths = [path for part in database for path in part], [*map(Path, queries)]
        for part in parts:
            part.refuse_outside()
        _refuse_repeated(names, "list with distractors")
        stamps = _stamp_of_many(names, [*query_paths, *paths], facts) if many else []
    for part in () if stamps else parts:
        part.refuse_missing()
    return RetrievalDataset(
        name,
        ground_truth,
        names[len(query_paths) :],
        ImagePaths(paths),
        query_paths,
        folder,
        distractors,
        verify,
        stamps,
    )


@dataclass(frozen=True)
class _Images:
    """A list of images below one folder; `dataset` names it in errors."""

    folder: Path
    names: list[str]
    extension: str
    dataset: str

    def files(self) -> list[str]:
        """Returns the files' paths below the folder."""
        return [name + self.extension for name in self.names] if self.extension else self.names

    def paths(self) -> list[str]:
        """Returns the files' whole paths."""
        top = f"{self.folder}/"
        return [top + file for file in self.files()]

    def facts(self) -> array:
        """Returns what `runs.file_facts` does for the files."""
        return runs.file_facts(self.files(), str(self.folder))

    def refuse_outside(self) -> None:
        """Raises ValueError for a name that leads out of the folder."""
        try:
            runs.refuse_outside(self.folder, self.files())
        except ValueError as error:
            raise ValueError(f"{self.dataset} lists a name that cannot be used: {error}") from None

    def refuse_missing(self) -> None:
        """Raises FileNotFoundError, with the remedy, where images are missing."""
        paths = [os.path.split(name + self.extension) for name in self.names]
        folders = {folder for folder, _ in paths}
        files_of = {folder: _files(self.folder / folder) for folder in folders}
        missing = [(folder, file) for folder, file in paths if file not in files_of[folder]]
        if missing:
            names, (folder, file) = [os.path.join(*path) for path in missing], missing[0]
            raise FileNotFoundError(
                f"{len(missing)} of {len(self.names)} images that {self.dataset} lists are missing "
                f"in {self.folder}: {runs.abbreviate(names)}; "
                f"{_similar(file, self.extension, files_of[folder])}{_remedy(self.dataset)}"
            )


def _stamp_of_many(names: list[str], paths: list[Path | str], facts: Iterable[array]) -> list[str]:
    """Returns the stamp of very many images; nothing where one is missing."""
    with contextlib.suppress(FileNotFoundError):
        return [runs.images_stamp(names, paths, lambda: sum(facts, array("q")))]
    return []


def _distractors(folder: Path) -> _Images:
    images, file = _image_folder(folder, DISTRACTORS), folder / f"{DISTRACTORS}.txt"
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no list of distractors {file}; {_remedy(DISTRACTORS)}, or write one: a path "
            "below jpg/ a line"
        )
    names = [name for name in map(str.strip, runs.read_lines(file)) if name]
    return _Images(images, names, "", DISTRACTORS)


def _image_folder(folder: Path, name: str) -> Path:
    if not (folder / "jpg").is_dir():
        fault = "has no folder jpg/" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"the folder {folder} {fault}; {_remedy(name)}")
    return folder / "jpg"


def _similar(file: str, extension: str, files: set[str]) -> str:
    """Returns a remedy for a missing file that exists with another ending, else ""."""
    stem = file.removesuffix(extension)
    if stem in files:
        return f"{runs.printable(stem)} is there: list the names without {extension}; "
    other = min((name for name in files if os.path.splitext(name)[0] == stem), default=None)
    if other is None:
        return ""
    remedy = f"rename it to {file}, whatever its format" if extension else "list the whole name"
    return runs.printable(f"{other} is there: {remedy}; ")


def _files(folder: Path) -> set[str]:
    """Lists a folder's files at once: a million look-ups take minutes on a network disk."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except PermissionError:
        raise
    except (OSError, UnicodeError):
        return set()


def _remedy(name: str) -> str:
    if name in DOWNLOADS:
        return f"`vitgal download {name}` downloads it"
    return f"a benchmark folder holds jpg/ with every listed image and gnd_{name}.pkl"


class QueryError(runs.UserError, ValueError):
    """There is no such query; the message states the range."""


def check_query(ground_truth: GroundTruth, query: int) -> int:
    """Returns a query's index unchanged; QueryError states the range where it is outside."""
    if not 0 <= query < len(ground_truth.queries):
        raise QueryError(
            f"query_index {query}: {ground_truth.name} has the queries 0 to "
            f"{len(ground_truth.queries) - 1}"
        )
    return query
