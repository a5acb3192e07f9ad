"""An audit of data sets: copies and near copies within a folder of images, or between two.

Global descriptors propose pairs, `retrieval.compare_views` decides. Descriptors are stored by the
sha256 of a file's bytes, in blocks, so that a killed audit goes on and a renamed image is known:

    <store>/<fingerprint of settings>/00000.npz   keys (n, 33) uint8, descriptors (n, D) float16
"""

import functools
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from vitgal import runs
from vitgal.data import gldv2
from vitgal.data.images import resize
from vitgal.data.photographs import PhotographError, file_digest, list_photographs, read_upright
from vitgal.features.files import read_arrays
from vitgal.models import inference
from vitgal.models.descriptors import describe
from vitgal.models.sources import weights_fingerprint
from vitgal.retrieval.copies import Comparison, View, compare_views, copy_candidates, group_pairs
from vitgal.retrieval.exact_search import block_slices
from vitgal.retrieval.presence import Presence
from vitgal.settings import RerankingSettings
from vitgal.stages.own import Describer, no_formulas
from vitgal.stages.presence import known_presence

BLOCK = 256  # images that are described between two writes
ROWS = 1 << 15  # descriptors in memory at once: 84 MB of 1,280 values
KEPT_VIEWS = 500  # in memory: with their mirror images up to 1.3 MB each
THREADS = 4
SAME_BYTES = Comparison(0, 1.0, (1.0, 1.0), ("the same file",))
PLAIN, MIRRORED = "00", "01"  # end the key of an image's and of its mirror image's descriptor


@dataclass(frozen=True, eq=False)
class Audit:
    """The copies of a folder, or between it and another.

    pairs: a row a pair of copies, or of images of one place: group (-1: no copies), first and
    second (indices into names[0] and into names[-1]), copy (bool), change, shared_first,
    shared_second, agreement, inliers, probability (that both show one place).
    """

    folders: list[Path]  # one or two
    names: list[list[str]]  # of the images of each folder, sorted
    pairs: pd.DataFrame
    left_out: dict[str, str]  # images that could not be compared -> the reason
    candidates: int  # pairs that were compared

    @property
    def copies(self) -> pd.DataFrame:
        """The pairs of copies."""
        return self.pairs[self.pairs["copy"]]

    def path(self, side: int, index: int) -> Path:
        """Returns the file of an image: side 0 of `first`, 1 of `second`."""
        return self.folders[-side] / self.names[-side][index]

    def leave_out(self) -> list[str]:
        """Returns the images of the first folder to leave out, as notebook 01's `exclude` reads.

        Between two folders every image with a copy in the other; within one all of a group but the
        largest in pixels of the file. An image at GLDv2's place in the folder is named by its id.
        """
        names, copies = self.names[0], self.copies
        chosen = set(copies["first"])
        if len(self.folders) == 1:
            chosen |= set(copies["second"])
            for _, group in copies.groupby("group"):
                images = sorted({*group["first"], *group["second"]})
                sizes = [read_upright(self.path(0, image)).size for image in images]
                chosen.discard(images[sizes.index(max(sizes))])
        ids = {name: Path(name).stem for name in names}
        return [
            ids[name] if name == gldv2.image_path(ids[name].ljust(3)) else name
            for name in (names[image] for image in sorted(chosen))
        ]

    def overlap(self) -> pd.DataFrame:
        """Lists the first folder's images that show a place of the second's, as 01 reads them.

        `id`, `test_set` (the second image's folder, `jpg` passed over), `copy`, `inliers`,
        `probability`, the greatest of each: of GLDv2 the `overlap_table`.
        """
        rows = []
        for row in self.pairs.itertuples():
            parts = [part for part in self.path(1, row.second).parent.parts if part != "jpg"]
            name = Path(self.names[0][row.first]).stem
            rows.append((name, parts[-1], bool(row.copy), row.inliers, row.probability))
        columns = ["id", "test_set", "copy", "inliers", "probability"]
        table = pd.DataFrame(rows, columns=columns)
        table = table.groupby(["id", "test_set"], as_index=False).max()
        return table.astype({"copy": int})

    def report(self) -> str:
        """Returns the counts in words."""
        groups, copies = self.copies["group"].nunique(), self.copies
        images = " and ".join(f"{len(names):,}" for names in self.names)
        where = "between two folders of" if len(self.folders) == 2 else "among"
        lines = [
            f"{len(copies):,} pairs of copies in {groups:,} groups {where} {images} images; "
            f"{self.candidates:,} pairs compared"
        ]
        lines += [
            f"left out: {runs.printable(name)}: {runs.printable(reason)}"
            for name, reason in sorted(self.left_out.items())
        ]
        return "\n".join(lines)


def find_copies(
    folder: Path,
    other: Path | None = None,
    *,
    describer: Describer,
    store: Path,
    neighbours: int = 10,
    settings: RerankingSettings | None = None,
) -> Audit:
    """Finds the copies within a folder and its sub-folders, or between it and another.

    describer: descriptors are made by its settings of global ones. store: keeps the descriptors.
    neighbours: most similar images that an image is compared with, as it is and mirrored; between
    two folders those of the smaller one's images. settings: if a model of presence is known for
    them and the describer, images of two folders also show one place from its threshold on. An
    image that cannot be read is named and left out. Raises PhotographError where a folder has no
    photograph or the two are or hold each other.
    """
    if neighbours < 1:
        raise PhotographError(f"--neighbours is {neighbours}; it must be at least 1")
    folders = [Path(folder)] if other is None else [Path(folder), Path(other)]
    listings = [list_photographs(part) for part in folders]
    _refuse_nested(folders)
    descriptors = GlobalStore(store, describer)
    left_out: dict[str, str] = {}
    for listing in listings:
        left_out |= {str(listing.folder / n): reason for n, reason in listing.unsupported.items()}
    sides = [_keyed(listing.folder, listing.names, left_out) for listing in listings]
    unique = [dict(zip(keys, paths, strict=True)) for keys, paths in sides]
    query = 1 if len(sides) == 2 and len(unique[1]) < len(unique[0]) else 0
    for side, images in enumerate(unique):
        failures = descriptors.describe(images, mirrored=side == query)
        left_out |= {str(images[key]): reason for key, reason in failures.items()}
    keys = [[key for key in images if key + PLAIN in descriptors] for images in unique]
    plain, mirror = (
        descriptors.rows([key + end for key in keys[query]]) for end in (PLAIN, MIRRORED)
    )
    others = keys[1 - query] if len(sides) == 2 else None
    database = None if others is None else descriptors.rows([key + PLAIN for key in others])
    candidates, similarities = copy_candidates(plain, mirror, database, count=neighbours)
    if query == 1:
        candidates = candidates[:, [1, 0, 2]]
    files = [[images[key] for key in part] for images, part in zip(unique, keys, strict=True)]
    presence = known_presence(describer, settings) if settings and other else None
    compared = {
        (keys[0][a], keys[-1][b]): comparison
        for (a, b), comparison in _compared(files, candidates, similarities, presence).items()
    }
    names = [[p.relative_to(f).as_posix() for p in paths]
             for f, (_, paths) in zip(folders, sides, strict=True)]  # fmt: skip
    pairs = _pair_table([keys for keys, _ in sides], compared)
    return Audit(folders, names, pairs, left_out, len(candidates))


def _refuse_nested(folders: list[Path]) -> None:
    resolved = [folder.resolve() for folder in folders]
    if len(resolved) == 2 and any(a.is_relative_to(b) for a, b in (resolved, resolved[::-1])):
        same = "both are one folder" if resolved[0] == resolved[1] else "one holds the other"
        raise PhotographError(
            f"{folders[0]} and {folders[1]}: {same}, and every image would be a copy of itself: "
            "name one folder to find the copies within it"
        )


def _keyed(
    folder: Path, names: Sequence[str], left_out: dict[str, str]
) -> tuple[list[str], list[Path]]:
    """Returns the sha256 and file of each readable image; adds the others to `left_out`."""
    keys, paths = [], []
    for path in (folder / name for name in names):
        try:
            keys.append(file_digest(path))
            paths.append(path)
        except PhotographError as error:
            left_out[str(path)] = str(error)
    return keys, paths


class GlobalStore:
    """Global descriptors of images and of their mirror images by content, in blocks on disk."""

    def __init__(self, folder: Path, describer: Describer) -> None:
        settings = describer.describing
        self.describer = describer
        self.precision = describer.precision(settings)
        parameters = runs.plain({
            "format": 1,
            "weights": weights_fingerprint(describer.model),
            "settings": [settings.size, settings.resize, settings.scales, settings.multiple],
            "pooling": settings.pooling,
            "precision": self.precision,
        })  # fmt: skip
        self.folder = folder / runs.fingerprint(parameters)[:12]
        runs.refuse_links([folder, self.folder])
        if not (self.folder / "settings.json").exists():
            runs.write_json(self.folder / "settings.json", parameters)
        self.rows_of: dict[str, tuple[Path, int]] = {}  # by key: file and row
        for file in sorted(self.folder.glob("*.npz")):
            self._open(file)

    def __contains__(self, key: str) -> bool:
        return key in self.rows_of

    def _open(self, file: Path) -> None:
        try:
            keys = read_arrays(file, ("keys", "descriptors"))["keys"]
        except (OSError, ValueError):  # damaged: its images are described again
            return
        self.rows_of |= {bytes(key).hex(): (file, row) for row, key in enumerate(keys)}

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """Returns the descriptors (K, D) float16 of K images that are stored, read-only.

        They are mapped from a temporary file in the store, which has no name; no image gives
        (0, 1). ROWS of them are in memory at once. OSError: the disk is full.
        """
        if not keys:
            return np.zeros((0, 1), np.float16)
        file = self.folder / "descriptors"
        with runs.explained_full_disk(file), tempfile.TemporaryFile(dir=self.folder) as handle:
            for part in block_slices(len(keys), ROWS):
                self._gather(keys[part]).tofile(handle)
            handle.flush()
            return np.memmap(handle, np.float16, "r").reshape(len(keys), -1)

    def _gather(self, keys: Sequence[str]) -> np.ndarray:
        """Reads descriptors (K, D) from their files, each of which is opened once."""
        by_file: dict[Path, list[int]] = {}
        for index, key in enumerate(keys):
            by_file.setdefault(self.rows_of[key][0], []).append(index)
        blocks, order = [], []
        for file, indices in by_file.items():
            descriptors = read_arrays(file, ("keys", "descriptors"))["descriptors"]
            blocks.append(descriptors[[self.rows_of[keys[index]][1] for index in indices]])
            order += indices
        return np.concatenate(blocks)[np.argsort(order)]

    def describe(self, images: dict[str, Path], *, mirrored: bool) -> dict[str, str]:
        """Describes the images that are not stored, keyed by content, and their mirror images.

        Returns the keys of images that cannot be read, each with the reason.
        """
        ends = (PLAIN, MIRRORED) if mirrored else (PLAIN,)
        missing = [key for key in images if any(key + end not in self for end in ends)]
        failures: dict[str, str] = {}
        with (
            runs.locked(self.folder),
            tqdm(total=len(missing), desc="describing", unit="image") as bar,
            ThreadPoolExecutor(THREADS) as pool,
        ):
            number = len(list(self.folder.glob("*.npz")))
            for start in range(0, len(missing), BLOCK):
                block = missing[start : start + BLOCK]
                inputs = list(pool.map(self._input, [images[key] for key in block]))
                pairs = list(zip(block, inputs, strict=True))
                failures |= {key: input for key, input in pairs if isinstance(input, str)}
                whole = [(key, input) for key, input in pairs if not isinstance(input, str)]
                if whole:
                    keys, vectors = self._vectors(whole, ends)
                    file = self.folder / f"{number:05}.npz"
                    hashes = np.frombuffer(bytes.fromhex("".join(keys)), np.uint8)
                    hashes = hashes.reshape(len(keys), -1)
                    runs.write_arrays(file, {"keys": hashes, "descriptors": vectors})
                    self._open(file)
                    number += 1
                bar.update(len(block))
        return failures

    def _input(self, path: Path) -> np.ndarray | str:
        """Returns an image as the network takes it, (h, w, 3) uint8, or why it cannot be read."""
        settings = self.describer.describing
        try:
            image = read_upright(path)
        except PhotographError as error:
            return str(error).removeprefix(f"{path.name}: ")
        return resize(image, settings.size, settings.resize, settings.multiple)

    def _vectors(
        self, inputs: Iterable[tuple[str, np.ndarray]], ends: Sequence[str]
    ) -> tuple[list[str], np.ndarray]:
        network, settings = self.describer.network, self.describer.describing
        keys, vectors = [], []
        flipped = {PLAIN: slice(None), MIRRORED: slice(None, None, -1)}
        every = [(key + end, np.ascontiguousarray(image[:, flipped[end]]))
                 for key, image in inputs for end in ends]  # fmt: skip
        with (
            inference.limited_threads(self.describer.machine.threads),
            inference.inference(network, self.precision),
        ):
            for labels, images in inference.batches(every, self.describer.machine.batch_size):
                vectors.append(describe(network, images, settings.scales))
                keys += labels
        return keys, np.concatenate(vectors).astype(np.float16)


def _compared(
    files: Sequence[Sequence[Path]],
    candidates: np.ndarray,
    similarities: np.ndarray,
    presence: Presence | None,
) -> dict[tuple[int, int], Comparison]:
    """Returns pairs of files that are copies or show one place, the better of plain and mirrored.

    files: of one or two folders. candidates: (P, 3) integers, indices of both files and whether
    the first is mirrored. similarities: (P,) floats. presence: finds further images of one place.
    """

    @functools.lru_cache(KEPT_VIEWS)
    def view(path: Path) -> View | None:
        """Returns an image's view, None where the file has vanished or changed."""
        try:
            return View.of(read_upright(path))
        except PhotographError:
            return None

    def compare(pair: Sequence[int]) -> Comparison | None:
        """Compares a candidate, a row of `candidates`."""
        one, other = view(files[0][pair[0]]), view(files[-1][pair[1]])
        if one is None or other is None:
            return None
        return compare_views(one, other, mirrored=bool(pair[2]))

    best: dict[tuple[int, int], Comparison] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        parts = range(0, len(candidates), BLOCK)
        for start in tqdm(parts, desc="comparing", unit="block"):
            part = slice(start, start + BLOCK)
            block = candidates[part].tolist()
            results = zip(block, similarities[part], pool.map(compare, block), strict=True)
            for (*pair, mirrored), similarity, comparison in results:
                if comparison is None:
                    continue
                probable = False
                if presence is not None and not mirrored:
                    # NOTE Stricter than `vitgal own`: inliers at 400 pixels, none below six.
                    value = float(presence.probabilities(similarity, comparison.inliers))
                    comparison = replace(comparison, probability=value)
                    probable = value >= presence.threshold
                if not (comparison.is_place or probable):
                    continue
                key = tuple(pair)
                best[key] = max(
                    (best.get(key, comparison), comparison),
                    key=lambda each: (each.is_copy, each.agreement, each.inliers),
                )
    return dict(sorted(best.items()))


def _pair_table(keys: list[list[str]], compared: dict[tuple[str, str], Comparison]) -> pd.DataFrame:
    """Returns `Audit.pairs`: the comparisons of contents, for every file with such a content."""
    files: list[dict[str, list[int]]] = []  # of each folder, by content
    for side in keys:
        files.append({})
        for index, key in enumerate(side):
            files[-1].setdefault(key, []).append(index)
    same = {(key, key): SAME_BYTES for key in files[0] if key in files[-1]}
    rows = []
    for (one, other), comparison in (compared | same).items():
        for first in files[0][one]:
            for second in files[-1][other]:
                if len(keys) == 2 or one != other or first < second:
                    rows.append((first, second, comparison))
    rows.sort(key=lambda row: row[:2])
    copies = np.array([row[:2] for row in rows if row[2].is_copy], np.int64).reshape(-1, 2)
    copies += [0, len(keys[0]) if len(keys) == 2 else 0]
    groups = group_pairs(copies, sum(map(len, keys)))
    numbers = {label: n for n, label in enumerate(dict.fromkeys(groups[copies[:, 0]].tolist()))}
    table = pd.DataFrame({
        "group": [numbers[groups[a]] if c.is_copy else -1 for a, _, c in rows],
        "first": [row[0] for row in rows],
        "second": [row[1] for row in rows],
        "copy": np.array([c.is_copy for *_, c in rows], bool),
        "change": ["; ".join(c.changes) or "recompressed" * c.is_copy for *_, c in rows],
        "shared_first": [c.shared[0] for *_, c in rows],
        "shared_second": [c.shared[1] for *_, c in rows],
        "agreement": [c.agreement for *_, c in rows],
        "inliers": [c.inliers for *_, c in rows],
        "probability": [float(c.is_copy) or c.probability for *_, c in rows],
    })  # fmt: skip
    return table.sort_values(["group", "first", "second"], ignore_index=True)


def write_audit(result: Audit, folder: Path) -> Path:
    """Writes copies.csv, leave_out.txt and, between two folders, overlap.csv; returns the folder.

    copies.csv has the names of the pairs of copies and the columns of `Audit.pairs` that tell of
    copies. A name that a spreadsheet would run as a formula, as `=x.jpg`, is written as `./=x.jpg`.
    """
    table = result.copies.drop(columns=["copy", "probability"])
    for side, column in enumerate(("first", "second")):
        names = pd.Series([result.names[-side][i] for i in table[column]], table.index, object)
        table[column] = no_formulas(names)
    runs.write_text(folder / "copies.csv", table.to_csv(index=False, float_format="%.3f"))
    lines = ["# images to leave out, one a line: `exclude` of notebook 01", *result.leave_out()]
    runs.write_text(folder / "leave_out.txt", "".join(f"{line}\n" for line in lines))
    if len(result.folders) == 2:
        overlap = result.overlap()
        runs.write_text(folder / "overlap.csv", overlap.to_csv(index=False, float_format="%.3f"))
    return folder
