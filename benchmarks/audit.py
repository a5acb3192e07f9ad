"""Planted copies: how many `vitgal audit` finds, and how many of its pairs are right, in one run.

    python benchmarks/audit.py [PHOTOGRAPHS] [DISTRACTORS] [--copies 60] [--seed 0]
                               [--all | --held-out | --places] [--million]

Copies of PHOTOGRAPHS (default: the bundled ones) are added to them and to DISTRACTORS: in turn a
crop to a third, a resized, a recompressed, a mirrored one; with --all also recoloured, framed,
captioned, turned, and mirrored crops; with --held-out only kinds that the audit's limits were not
chosen on. A pair is right if it is a photograph with its own copy, or two copies of one.
--places: how many pairs of different photographs of one place are found, and how many of two
places, of all pairs of PHOTOGRAPHS (a sub-folder a place) and DISTRACTORS, by the number of inliers
alone and with the probability; these are compared with themselves as if with another folder.
--million: time and memory of proposing pairs among a million random descriptors.
"""

import argparse
import itertools
import resource
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from vitgal import runs
from vitgal.data.photographs import list_photographs, read_upright
from vitgal.retrieval import copies
from vitgal.settings import RerankingSettings, read_settings
from vitgal.stages import Audit, Describer, find_copies, own_models

PLANTED = ("crop", "resize", "recompression", "mirror")
FURTHER = ("mirrored crop", "grey", "recoloured", "border", "caption", "turned")
ONE_PLACE = {"giza_pyramids": "great_pyramid"}  # of the bundled photographs
HELD_OUT = ("rotation", "coarse JPEG", "blur", "gamma", "other aspect", "screenshot", "text")


def cut(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cuts a third of an image's area out of it, at a random place."""
    height, width = (int(side / np.sqrt(3)) for side in image.shape[:2])
    y, x = (rng.integers(0, whole - side + 1)
            for whole, side in zip(image.shape[:2], (height, width), strict=True))  # fmt: skip
    return image[y : y + height, x : x + width]


def copy_of(image: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Returns a copy (h, w, 3) of an image and the JPEG quality to write it with."""
    height, width = image.shape[:2]
    if kind in HELD_OUT:
        return held_out(image, kind, rng), 5 if kind == "coarse JPEG" else 85
    if kind == "recompression":
        return image, int(rng.integers(10, 40))
    if kind == "resize":
        size = [max(16, int(side * rng.uniform(0.3, 0.8))) for side in (width, height)]
        size[1] = max(16, size[0] * height // width)
        return cv2.resize(image, size, interpolation=cv2.INTER_AREA), 85
    if kind == "grey":
        return np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, 2), 85
    if kind == "recoloured":
        curves = 255 * np.linspace(0, 1, 256)[:, None] ** rng.uniform(0.6, 1.5, 3)
        return np.stack([curves[image[..., c], c] for c in range(3)], -1).astype(np.uint8), 85
    if kind == "border":
        side = max(height, width) // 10
        return cv2.copyMakeBorder(image, *[side] * 4, cv2.BORDER_CONSTANT, value=[255] * 3), 85
    if kind == "caption":
        image = image.copy()
        image[int(0.85 * height) :] = 0
        place = int(0.05 * width), int(0.95 * height)
        return cv2.putText(image, "a sunny day", place, 0, height / 400, [255] * 3, 2), 85
    if kind == "turned":
        turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-8, 8), 1.2)
        return cv2.warpAffine(image, turn, (width, height)), 85
    image = cut(image, rng) if "crop" in kind else image
    return (image[:, ::-1] if "mirror" in kind else image), 80


def held_out(image: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Returns a copy (h, w, 3) of an image, changed in one of the kinds of HELD_OUT."""
    height, width = image.shape[:2]
    longest = max(height, width)
    if kind == "rotation":  # by 3 degrees; what it lays bare is black
        turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.choice([-3, 3]), 1.0)
        return cv2.warpAffine(image, turn, (width, height))
    if kind == "blur":  # 1.6 to 4 pixels of 400
        return cv2.GaussianBlur(image, (0, 0), longest * rng.uniform(0.004, 0.01))
    if kind == "gamma":
        curve = 255 * np.linspace(0, 1, 256) ** rng.choice([0.4, 2.5])
        return curve[image].astype(np.uint8)
    if kind == "other aspect":  # a strip of the full width or height, 45 to 70 % of the area
        share = rng.uniform(0.45, 0.7)
        tall, wide = (height, int(share * width)) if rng.random() < 0.5 else (
            int(share * height), width)  # fmt: skip
        y, x = rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1)
        return image[y : y + tall, x : x + wide]
    if kind == "screenshot":  # upright screen, the photograph across it, bars with words
        screen = np.full((2 * longest, longest, 3), 245, np.uint8)
        photograph = cv2.resize(image, (longest, round(height * longest / width)))
        photograph = photograph[: longest + longest // 2]
        tall, top = len(photograph), longest // 4
        screen[top : top + tall] = photograph
        for line, words in enumerate(("12:42   holiday   87 %", "Anna and 41 others like this")):
            place = longest // 20, (longest // 8, top + tall + longest // 12)[line]
            cv2.putText(screen, words, place, 0, longest / 800, [20] * 3, 2, cv2.LINE_AA)
        return screen
    if kind == "coarse JPEG":
        return image
    image = image.copy()
    for line in range(4):  # white words with a dark edge over the middle half
        place = width // 12, int(height * (0.3 + 0.14 * line))
        for colour, stroke in ((0, longest // 100), (255, longest // 200)):
            cv2.putText(image, "GREETINGS FROM HERE", place, 0, width / 420, [colour] * 3,
                        max(2, stroke), cv2.LINE_AA)  # fmt: skip
    return image


def plant(sources: list[Path], folder: Path, kinds: list[str], seed: int) -> dict[str, Path]:
    """Writes a copy of a random photograph for each kind; returns the photograph by the name."""
    rng = np.random.default_rng(seed)
    origins = {}
    for number, source in enumerate(
        rng.choice(len(sources), len(kinds), len(kinds) > len(sources))
    ):
        copy, quality = copy_of(read_upright(sources[source]), kinds[number], rng)
        name = f"copy_{number:03}_{kinds[number].replace(' ', '_')}.jpg"
        pixels = np.ascontiguousarray(copy[..., ::-1])
        cv2.imwrite(str(folder / name), pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
        origins[name] = sources[source]
    return origins


def scores(result: Audit, origins: dict[str, Path]) -> None:
    """Prints recall and precision, of all and by kind, and every miss and wrong pair.

    A copy is found if it is in a pair with its photograph; a pair of two copies of one is right.
    """
    rows, found = [], set()
    for row in result.copies.itertuples():
        pair = result.path(0, row.first), result.path(1, row.second)
        planted = {path.name for path in pair} & set(origins)
        ends = {origins.get(path.name, path.resolve()) for path in pair}
        right = bool(planted) and len(ends) == 1
        found |= planted if right and len(planted) == 1 else set()
        rows.append(({kind_of(name) for name in planted}, right))
        if not right:
            print(f"wrong: {pair[0].name} and {pair[1].name}: {row.change}")
    print(*(f"missed: {name}" for name in sorted(set(origins) - found)), sep="\n")
    for kind in (*dict.fromkeys(map(kind_of, origins)), "all"):
        names = {name for name in origins if kind in ("all", kind_of(name))}
        pairs = [right for kinds, right in rows if kind == "all" or kind in kinds]
        print(f"{kind}: recall {len(found & names)}/{len(names)}, precision "
              f"{sum(pairs)}/{len(pairs)}")  # fmt: skip
    print(f"{result.candidates} pairs compared")


def kind_of(name: str) -> str:
    """Returns the kind of change that a planted file's name says."""
    return Path(name).stem.split("_", 2)[2].replace("_", " ")


def places(
    folders: list[Path], describer: Describer, settings: RerankingSettings, store: Path
) -> None:
    """Prints by either rule the pairs that are found, right and wrong, and the places."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        for folder in folders:
            for top in (one, other):
                (Path(top) / folder.name).symlink_to(folder.resolve(), target_is_directory=True)
        result = find_copies(
            Path(one), Path(other), describer=describer, store=store, settings=settings
        )
    names = result.names[0]
    # A distractor is a place of its own.
    place_of = [ONE_PLACE.get(Path(name).parts[1], Path(name).parts[1]) for name in names]
    true = {pair for pair in itertools.combinations(range(len(names)), 2)
            if len({place_of[image] for image in pair}) == 1}  # fmt: skip
    table = result.pairs[result.pairs["first"] != result.pairs["second"]]
    enough = table["copy"] | (table["inliers"] >= copies.LEAST_INLIERS)
    for rule, rows in (("inliers", table[enough]), ("and probability", table)):
        found = {tuple(sorted(pair)) for pair in rows[["first", "second"]].to_numpy().tolist()}
        right, known = found & true, {place_of[image] for image, _ in true}
        print(f"by {rule}: {len(right)} of {len(true)} pairs, {len(found - true)} wrong; "
              f"{len({place_of[image] for image, _ in right})} of {len(known)} places")  # fmt: skip
        for pair in sorted(found - true) if rule != "inliers" else ():
            print("  wrong:", *(names[image] for image in pair))


def propose_among_a_million() -> None:
    """Prints what pairs of 5,000 images with a million take."""
    rng = np.random.default_rng(0)
    database = np.empty((1_000_000, 128), np.float16)
    for part in range(0, len(database), 10_000):
        rows = rng.standard_normal((10_000, 128), np.float32)
        database[part : part + 10_000] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    planted = rng.choice(len(database), 5000, replace=False)
    queries = database[planted].astype(np.float32)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    pairs, _ = copies.copy_candidates(queries, queries[:, ::-1].copy(), database, count=10)
    seconds = time.process_time() - began
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    own = pairs[pairs[:, 2] == 0]
    hits = len({(a, b) for a, b in own[:, :2].tolist()} & set(enumerate(planted.tolist())))
    print(f"5,000 of a million: {hits} found, {seconds:.0f} s of processor time, {peak:.0f} MiB")


def main() -> None:
    """Plants, audits, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--copies", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--places", action="store_true")
    parser.add_argument("--million", action="store_true")
    options = parser.parse_args()
    if options.million:
        return propose_among_a_million()
    folders = options.folders or [runs.resolve("third_party/landmarks")]
    run = runs.run_folder("audit")
    models = own_models(run)
    settings = models.complete(read_settings({}))
    describer = models.describer(run, settings)
    if options.places:
        return places(folders, describer, settings.reranking, run / "descriptors")
    kinds = HELD_OUT if options.held_out else PLANTED + FURTHER * options.all
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch)
        for folder in folders:
            (top / folder.name).symlink_to(folder.resolve(), target_is_directory=True)
        listing = list_photographs(folders[0])
        sources = [(listing.folder / name).resolve() for name in listing.names]
        (top / "planted").mkdir()
        kinds = [kinds[number % len(kinds)] for number in range(options.copies)]
        origins = plant(sources, top / "planted", kinds, options.seed)
        began = time.process_time()
        result = find_copies(top, describer=describer, store=run / "descriptors")
        print(f"{len(result.names[0])} images, {time.process_time() - began:.0f} s of processor "
              f"time; {models.reason.split(';')[0]}")  # fmt: skip
        scores(result, origins)


if __name__ == "__main__":
    main()
