"""Every reader of files from elsewhere, each with whole files that a mutation starts from."""

import argparse
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.data.download_server import tar
from tests.features.examples import ITEMS, NAMES, ROWS, features, save_hloc, save_npy
from vitgal import runs
from vitgal.app.summary import score_lines
from vitgal.data import gldv2, images, photographs, revisited, splits
from vitgal.data.download import archives, sources
from vitgal.evaluation import Tuning, compare_folders
from vitgal.features import interchange, store
from vitgal.features.descriptors import read_descriptors
from vitgal.models import weights
from vitgal.retrieval import shortlists
from vitgal.retrieval.ranking import Positions, Ranking
from vitgal.settings import reader as settings
from vitgal.stages import own_describer

TRUTH = revisited.GroundTruth(
    name="tiny",
    database=["a", "b", "c", "d"],
    queries=["q", "r"],
    boxes=np.array([[0.0, 0, 20, 20], [1, 2, 30, 31]]),
    easy=[np.array([0]), np.array([], np.int64)],
    hard=[np.array([1]), np.array([2])],
    junk=[np.array([3]), np.array([], np.int64)],
)


@dataclass(frozen=True)
class Reader:
    """A reader: writes whole files into a folder, and reads them from there.

    Attributes:
        write: fills a folder.
        read: reads it; raises one of `errors`, or nothing.
        changed: pattern of the files that are mutated.
        errors: beside UserError, what the reader documents.
    """

    write: Callable[[Path], object]
    read: Callable[[Path], object]
    changed: str = "**/*"
    errors: tuple[type[Exception], ...] = ()


def _store(folder: Path) -> None:
    items = list(ITEMS.items())
    store.write_shard(folder / "shard-00", items[:2])
    failures = [{"name": "d", "reason": "empty"}]
    store.write_shard(folder / "shard-01", items[2:], failures=failures)
    store.write_index(folder)


def _read_store(folder: Path) -> None:
    for number, names in (("00", "ab"), ("01", "cd")):
        store.whole_shard(folder / f"shard-{number}", names, store.ShardFormat(code_dim=10))
    opened = store.FeatureStore.open(folder)
    for key in (*opened, *ITEMS):
        if key in opened:
            opened[key].subset(slice(2))
    opened.verify()


def _rows(folder: Path) -> store.RowFile:
    rows = store.RowFile.open(folder / "rows.npy", (4, 3), settings={"precision": "fp32"})
    rows.append(np.ones((4 - rows.rows, 3)), [{"name": "a", "reason": "empty"}])
    return rows


def _cache(folder: Path) -> None:
    arrays = store.encode_features(features(4), "float16")
    own = {"descriptor": np.ones(8, np.float32), "sizes": np.array([*features(4).sizes, 1])}
    runs.write_arrays(folder / "x.npz", own | arrays)


def _read_cache(folder: Path) -> None:
    description = own_describer.read_description(folder / "x.npz")
    assert description is None or description.features.descriptors.dtype == np.float32


def _ranking(folder: Path) -> None:
    places = Positions([np.array([0, 2])], [np.array([3, 1])], 4)
    Ranking(np.array([[3], [2], [1], [0]]), places).save(folder)
    shortlists.write_global_rank(folder / "global_rank.npy", np.arange(8).reshape(4, 2))
    (folder / "shortlist.txt").write_text("q a\nq b\nr c\n".replace(" ", "\t"))
    lines = "../jpg/q.jpg 0 0 20 20\n../jpg/a.jpg -1 -1 -1 -1\n"
    (folder / "rerank_path.txt").write_text(lines)


def _published(folder: Path) -> None:
    items = {"a": features(3), "b": features(2, 1)}
    interchange.export_published(items, folder, {"a": "../a.jpg", "b": "../b.jpg"})


def _pictures(folder: Path) -> None:
    picture = Image.fromarray(np.arange(48 * 40 * 3, dtype=np.uint8).reshape(48, 40, 3))
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010F: "maker", 0x011A: 72.0})
    for suffix in ("jpg", "png", "tif", "webp", "bmp", "gif", "avif", "ppm", "jp2"):
        picture.save(folder / f"x.{suffix}", exif=exif)
    picture.save(folder / "p.jpg", progressive=True)


def _read_pictures(folder: Path) -> None:
    photographs.list_photographs(folder)
    for path in folder.iterdir():
        for read in (images.read_image, photographs.read_oriented, images.stored_size):
            try:
                read(path)
            except runs.UserError:
                pass


def _tables(folder: Path) -> None:
    (folder / "train.csv").write_text("id,landmark_id\naaaa,1\nbbbb,1\ncccc,2\n")
    (folder / "train_clean.csv").write_text("landmark_id,images\n1,aaaa bbbb\n2,cccc\n")
    (folder / "exclude.txt").write_text("aaaa # why\n2\n")
    (folder / "overlap.csv").write_text("id,test_set\naaaa,roxford5k\n")


def _read_tables(folder: Path) -> None:
    gldv2.exclude_images(
        gldv2.read_landmark_table(folder / "train.csv"),
        gldv2.read_exclusions(folder / "exclude.txt"),
    )
    table = gldv2.read_landmark_table(folder / "train_clean.csv")
    gldv2.overlap_audit(table, gldv2.read_overlap(folder / "overlap.csv"))


def _split(folder: Path) -> None:
    (folder / "train.csv").write_text("path,label\na/a.jpg,0\nb/b.jpg,1\n")
    roles = "path,label,role\na.jpg,0,query\nb.jpg,0,database\nc.jpg,1,database\n"
    (folder / "val_retrieval.csv").write_text(roles)
    (folder / "train_split.txt").write_text("train/a.jpg 0\ntrain/b.jpg 1\n")


def _read_split(folder: Path) -> None:
    splits.read_split(folder, "train")
    splits.validation_ground_truth(splits.read_split(folder, "val_retrieval"))
    splits.read_split_txt(folder / "train_split.txt")


def _sources(folder: Path) -> None:
    text = (runs.checkout() / "third_party" / "sources.toml").read_text()
    (folder / "sources.toml").write_text(text[:6000].rpartition("\n\n[")[0] + "\n")
    record = {"source": "x", "files": {"a": {"bytes": 3, "sha256": "0" * 64}}, "archives": {}}
    runs.write_json(folder / "x.download.json", record)


def _read_sources(folder: Path) -> None:
    sources.read_sources(folder / "sources.toml")
    empty = sources.Source("x", "", "x", "", "")
    _ = sources.SourceFolder(empty, folder).record


def _params(folder: Path) -> None:
    (folder / "base.yaml").write_text("top: 20\nsize: 512\n")
    text = "extends: base.yaml\nscales: [1.0, 0.7]\nrun_dir: runs/x\nmax_distance: 0.8\n"
    (folder / "x.yaml").write_text(text)


def _stage(folder: Path) -> None:
    with runs.stage(folder / "s", "s", parameters={"top": 3}, inputs={"a": "0" * 64}) as stage:
        runs.write_json(stage.folder / "out.json", [1, 2])
        stage.finish(["out.json"], {"seconds": 1.5})


def _read_stage(folder: Path) -> None:
    runs.read_stage(folder / "s", "notebook 04")
    runs.output_fingerprint(folder / "s", "out.json", "notebook 04")
    with runs.stage(folder / "s", "s", parameters={"top": 3}, inputs={"a": "0" * 64}):
        pass


def _weights(folder: Path) -> None:
    tensors = {"a.weight": torch.ones(3, 2), "b.bias": torch.zeros(3)}
    save_file(tensors, folder / "x.safetensors", {"configuration": '{"architecture": "x"}'})
    content = {"model": tensors, "args": argparse.Namespace(lr=0.1), "epoch": 3}
    torch.save(content, folder / "x.pth")


def _read_weights(folder: Path) -> None:
    for name in ("x.safetensors", "x.pth"):
        for read in (weights.read_configuration, weights.load_model):
            try:
                read(folder / name)
            except (runs.UserError, ValueError):
                pass


def _results(folder: Path) -> None:
    score = {"map": 0.5, "mp_at": {"1": 0.5}, "ap": [0.5, None]}
    protocol = {"dataset": "tiny", "top": 3}
    document = {"medium": score, "protocol": protocol, "queries": ["q", "r"], "parameters": {}}
    for name in ("a", "b"):
        runs.write_json(folder / name / "scores.json", document)
    points = {"chosen": [0, 1, 0], "current": [0, 0, 0], "before": [0.5, 0.4], "groups": [0, 1]}
    grid = {"max_distance": [0.8], "threshold": [8, 16], "top": [100]}
    runs.write_json(folder / "tuning.json", {"grid": grid} | points)
    runs.write_array(folder / "ap.npy", np.full((1, 2, 1, 2), 0.5))


def _read_results(folder: Path) -> None:
    compare_folders(folder / "a", folder / "b", names=("a", "b"))
    Tuning.read(folder).advice()
    score_lines(folder)


def _own_pickle(folder: Path) -> None:
    revisited.write_ground_truth(folder / "gnd_tiny.pkl", TRUTH)
    for protocol in (0, 2, 5):  # the published files are of several
        content = pickle.loads((folder / "gnd_tiny.pkl").read_bytes())
        (folder / f"gnd_{protocol}.pkl").write_bytes(pickle.dumps(content, protocol))


def _each(read: Callable[[Path], object]) -> Callable[[Path], None]:
    """Reads every file of a folder with one reader."""

    def all_of(folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            read(path)

    return all_of


def _unpack(folder: Path) -> None:
    for arrange in ("flat", "tree"):
        target = folder / "out"
        archives.unpack(folder / "x.tar", target, arrange=arrange, label="", progress=False)


def _read_lists(folder: Path) -> None:
    shortlists.read_shortlist(folder / "shortlist.txt")
    shortlists.read_rerank_paths(folder / "rerank_path.txt")


def _read_params(folder: Path) -> None:
    _ = settings.settings_of(settings.read_file(folder / "x.yaml")).describing


V = (ValueError,)
READERS: dict[str, Reader] = {
    "feature store": Reader(_store, _read_store, errors=(FileNotFoundError,)),
    "index of a store": Reader(_store, _read_store, "index/*", (FileNotFoundError,)),
    "rows": Reader(_rows, _rows),
    "cache of descriptions": Reader(_cache, _read_cache),
    "HDF5 descriptors": Reader(
        lambda folder: save_hloc(folder / "x.h5"), lambda f: read_descriptors(f / "x.h5", NAMES)
    ),
    "npy descriptors": Reader(
        lambda folder: save_npy(folder / "x.npy", ROWS),
        lambda folder: read_descriptors(folder / "x.npy", NAMES),
    ),
    "published folder": Reader(_published, lambda f: list(interchange.import_published(f))),
    "rankings": Reader(_ranking, Ranking.load, "[pr]*.np?"),
    "global rank": Reader(
        _ranking, lambda f: shortlists.read_global_rank(f / "global_rank.npy"), "*.npy"
    ),
    "pair lists": Reader(_ranking, _read_lists, "*.txt", V),
    "ground truth": Reader(_own_pickle, _each(revisited.load_ground_truth), errors=V),
    "photographs": Reader(_pictures, _read_pictures, errors=(photographs.PhotographError,)),
    "landmark tables": Reader(_tables, _read_tables, errors=V),
    "splits": Reader(_split, _read_split, errors=V),
    "sources": Reader(_sources, _read_sources, errors=V),
    "archives": Reader(
        lambda f: (f / "x.tar").write_bytes(tar([("a.jpg", b"x" * 99), ("b/c.jpg", b"y")])),
        _unpack,
        "x.tar",
        V,
    ),
    "params": Reader(_params, _read_params, errors=(ValueError, FileNotFoundError)),
    "stage manifest": Reader(_stage, _read_stage),
    "weights": Reader(_weights, _read_weights),
    "scores and tuning": Reader(_results, _read_results, errors=V),
}
