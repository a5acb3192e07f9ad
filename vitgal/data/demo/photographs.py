"""The bundled photographs of landmarks, with their attribution and regions."""

import csv
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitgal import runs
from vitgal.data import images

PHOTOGRAPHS = "third_party/landmarks"
ATTRIBUTION = "ATTRIBUTION.csv"
REGIONS = "REGIONS.csv"
ATTRIBUTION_COLUMNS = ("file", "author", "licence", "source", "width", "height")
REGION_COLUMNS = ("file", "x0", "y0", "x1", "y1")
# Ten landmarks with two or three photographs, and fourteen well-known, dissimilar ones. Notre-Dame
# and the Arc du Carrousel are not for training, because a Paris test set shows them.
BENCHMARK_LANDMARKS = frozenset(
    """
    chenonceau christ_the_redeemer eiffel_tower louvre_pyramid mount_rushmore neuschwanstein
    qutub_minar statue_of_liberty sydney_opera taj_mahal
    arc_du_carrousel brandenburg_gate chambord chichen_itza colosseum giza_pyramids golden_temple
    great_pyramid hawa_mahal nagoya_castle notre_dame_paris petra reims_cathedral tower_bridge
    """.split()
)
# Landmarks at the same site: views of one are junk for queries of the other.
SAME_SITE = ({"giza_pyramids", "great_pyramid"},)
CENTRAL_REGION = (12, 10, 88, 92)  # x0 y0 x1 y1 in per cent, for a photograph not in REGIONS.csv


@dataclass(frozen=True)
class Photograph:
    """One bundled photograph; `region` is the box of its landmark, x0 y0 x1 y1 in pixels."""

    landmark: str
    name: str  # landmark_number
    path: Path
    width: int
    height: int
    author: str
    licence: str
    source: str
    region: tuple[float, float, float, float]

    def read(self) -> np.ndarray:
        """Decodes it to (H, W, 3) uint8 RGB; ValueError for a damaged image or another size."""
        image = images.read_image(self.path)
        if image.shape[:2] != (self.height, self.width):
            raise ValueError(
                f"{self.path} is {image.shape[1]} x {image.shape[0]} pixels, but {self.width} x "
                f"{self.height} in {ATTRIBUTION}; correct the table or restore the file"
            )
        return image


def read_photographs(folder: Path) -> list[Photograph]:
    """Lists the photographs of ATTRIBUTION.csv, with their regions of REGIONS.csv, sorted by file.

    Raises FileNotFoundError where the table or a photograph is missing, ValueError for a wrong row.
    """
    folder = Path(folder)
    table = folder / ATTRIBUTION
    if not table.is_file():
        restore = "restore third_party/landmarks (`git checkout third_party`, or install the wheel)"
        raise FileNotFoundError(f"{table} is missing: it lists the demo's photographs; {restore}")
    rows = _read_table(table, ATTRIBUTION_COLUMNS)
    missing = [row["file"] for row in rows if not (folder / row["file"]).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(rows)} photographs listed in {table} are missing, first "
            f"{missing[0]}; restore them or remove their rows"
        )
    path = folder / REGIONS
    regions = _read_table(path, REGION_COLUMNS) if path.is_file() else []
    regions = {row["file"]: _region(path, row) for row in regions}
    return [_photograph(folder, row, regions.get(row["file"], CENTRAL_REGION)) for row in rows]


def _read_table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    rows = sorted(csv.DictReader(runs.read_lines(path)), key=lambda row: row.get("file") or "")
    if not rows or tuple(rows[0]) != columns:
        raise ValueError(f"{path} must hold rows with the columns {','.join(columns)}")
    for row, following in itertools.pairwise(rows):
        if row["file"] == following["file"]:
            raise ValueError(f"{path} lists {row['file']} more than once; keep one row")
    return rows


def _region(path: Path, row: dict[str, str]) -> tuple[float, ...]:
    try:
        x0, y0, x1, y1 = (float(row[side]) for side in REGION_COLUMNS[1:])
    except (TypeError, ValueError):
        x0 = y0 = x1 = y1 = math.nan
    if not (0 <= x0 < x1 <= 100 and 0 <= y0 < y1 <= 100):
        raise ValueError(
            f"{path}: the region of {row['file']} needs numbers 0 <= x0 < x1 <= 100 and "
            "0 <= y0 < y1 <= 100 (per cent of the photograph's sides)"
        )
    return x0, y0, x1, y1


def _photograph(folder: Path, row: dict[str, str], region: Sequence[float]) -> Photograph:
    table, file = folder / ATTRIBUTION, row["file"]
    landmark, number = Path(file).parent.name, Path(file).stem
    if not (landmark and row["licence"] and row["author"]):
        raise ValueError(f"{table}: {file} needs a landmark's folder, an author and a licence")
    sides = (row["width"], row["height"])
    if not all(str(side).isdecimal() and int(side) for side in sides):
        raise ValueError(f"{table}: {file} needs a width and a height in pixels, not {sides}")
    width, height = map(int, sides)
    x0, y0, x1, y1 = region
    return Photograph(
        landmark=landmark,
        name=f"{landmark}_{number}",
        path=folder / file,
        width=width,
        height=height,
        author=row["author"],
        licence=row["licence"],
        source=row["source"],
        region=(x0 * width / 100, y0 * height / 100, x1 * width / 100, y1 * height / 100),
    )


def split_photographs(photographs: Iterable[Photograph]) -> tuple[list[Photograph], ...]:
    """Returns training and benchmark photographs by landmark; ValueError where a part is empty."""
    parts: tuple[list[Photograph], list[Photograph]] = ([], [])
    for photograph in photographs:
        parts[photograph.landmark in BENCHMARK_LANDMARKS].append(photograph)
    train, benchmark = parts
    if not train or not benchmark:
        raise ValueError(
            f"of the photographs {len(train)} are for training and {len(benchmark)} for the "
            "benchmark, but both need some: use the bundled third_party/landmarks"
        )
    return parts
