"""A small landmark table, as a frame, as a file and with its images."""

import pandas as pd

from vitgal.data import gldv2

# Out of order, with one class of a single image (7), classes of 2 (3) and 4 (12).
ROWS = [
    ("aa10", 12),
    ("bb20", 3),
    ("aa11", 12),
    ("cc30", 7),
    ("bb21", 3),
    ("aa12", 12),
    ("aa13", 12),
]


def frame(rows=ROWS):
    return pd.DataFrame(rows, columns=["id", "landmark_id"])


def write_table(path, rows=ROWS):
    path.write_text("id,landmark_id\n" + "".join(f"{image},{mark}\n" for image, mark in rows))
    return path


def make_images(folder, rows=ROWS):
    for image, _ in rows:
        path = folder / gldv2.image_path(image)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder
