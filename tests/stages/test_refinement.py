"""The global stage with a refinement: both rankings, what whitening is learnt from, refusals."""

import shutil
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

from tests.mini_benchmark import contents, evaluate, interrupt, noise
from vitgal import runs
from vitgal.data import revisited
from vitgal.evaluation import protocol
from vitgal.features import read_descriptors
from vitgal.retrieval import Ranking, RefinementError, expand_queries, shortlists
from vitgal.settings import GlobalSettings
from vitgal.stages import rank
from vitgal.stages.describe import evaluate_descriptors
from vitgal.stages.rank import GLOBAL_OUTPUTS
from vitgal.stages.whitening import RefineSet, open_refine_set

PLAIN = {"top_plain.npy", "similarities_plain.npy", "positions_plain.npz"}
WHITENED = {"whitening.npz", "whitened_norms.npy", "refined_queries.npy"}
Larger = tuple[revisited.RetrievalDataset, Path, Path]


def save(path: Path, rows: np.ndarray, names: list[str]) -> Path:
    np.save(path, rows.astype(np.float32))
    path.with_suffix(".txt").write_text("\n".join(names) + "\n")
    return path


@pytest.fixture
def larger(tmp_path) -> Larger:
    """3 queries, 300 images in 30 places that are never decoded; descriptors; those of others."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "data"
    (folder / "jpg").mkdir(parents=True)
    names = [*(f"q{q}" for q in range(3)), *(f"im{image:03}" for image in range(300))]
    for name in names:
        (folder / "jpg" / f"{name}.jpg").write_bytes(b"-")
    places = np.arange(300) % 30
    lists = [np.flatnonzero(places == q) for q in range(3)]
    truth = revisited.GroundTruth(
        "larger",
        names[3:],
        names[:3],
        np.tile([0.0, 0, 8, 8], (3, 1)),
        *([row[kind::3] for row in lists] for kind in range(3)),
    )
    revisited.write_ground_truth(folder / "gnd_larger.pkl", truth)
    centres = generator.standard_normal((60, 8))

    def views(places: np.ndarray) -> np.ndarray:
        return centres[places] + 1.2 * generator.standard_normal((len(places), 8)) + 1

    path = save(tmp_path / "x.npy", np.concatenate([views(np.arange(3)), views(places)]), names)
    others = save(tmp_path / "o.npy", views(30 + places), [f"other{i}" for i in range(300)])
    return revisited.open_dataset("larger", folder), path, others


def rank_larger(larger: Larger, run: Path, *chain: str, learnt: Path | None = None, **changed):
    """Runs the stage with a chain; returns its folder and scores."""
    dataset, path, _ = larger
    settings = GlobalSettings(**({"top": 5, "display": 5, "refine": chain} | changed))
    images = None if learnt is None else open_refine_set(run, settings, learnt, None)
    folder = evaluate_descriptors(run, dataset, settings, descriptors=path, refine_set=images)
    return folder, runs.read_json(folder / "scores.json")


def test_expansion_beside_the_plain_ranking(larger, tmp_path):
    dataset, path, _ = larger
    before, plain_scores = rank_larger(larger, tmp_path / "plain")
    folder, scores = rank_larger(larger, tmp_path / "run", "expansion neighbours=3 alpha=1")
    files = {file.name for file in folder.glob("[a-z]*")}
    assert files == {*GLOBAL_OUTPUTS, *PLAIN, "refined_queries.npy", "stage.json"}
    assert set(runs.read_stage(folder, "")["outputs"]) == files - {"stage.json"}
    for name, plain in [
        ("database.npy", "database.npy"),
        ("queries.npy", "queries.npy"),
        ("ranks.npy", "top_plain.npy"),
        ("similarities.npy", "similarities_plain.npy"),
        ("positions.npz", "positions_plain.npz"),
    ]:
        assert (before / name).read_bytes() == (folder / plain).read_bytes()
    assert scores["plain"]["medium"] == plain_scores["medium"]
    rows = read_descriptors(path, [*dataset.ground_truth.queries, *dataset.database])
    queries = expand_queries(rows[:3], rows[3:], neighbours=3, alpha=1)
    order = np.argsort(-(rows[3:].astype(float) @ queries.T), axis=0, kind="stable")
    ranking = Ranking.load(folder)
    np.testing.assert_array_equal(ranking.order, order[: len(ranking.order)])
    expected = protocol.evaluate(order, dataset.ground_truth)
    assert scores["medium"]["map"] == expected["medium"]["map"]
    assert scores["medium"]["map"] != scores["plain"]["medium"]["map"]
    listed = shortlists.read_shortlist(folder / "shortlist.txt")["q1"]
    assert listed[0] == dataset.database[order[0, 1]]


@pytest.mark.parametrize(
    "chain",
    [
        ("k_reciprocal depth=50",),
        ("superglobal depth=50",),
        ("diffusion depth=50 neighbours=10",),
        ("diffusion neighbours=10", "k_reciprocal depth=20 k1=5"),
        ("whitening power=0.25", "augmentation neighbours=3", "expansion", "diffusion"),
        ("learned_whitening dimensions=6", "superglobal"),
    ],
    ids=" ".join,
)
def test_ranks_of_all_labelled_images_are_those_of_the_whole_ranking(larger, tmp_path, chain):
    """With `display` above N the ranking is written out and can be scored by itself."""
    dataset, path, others = larger
    if "learned" in chain[0]:
        split_of(tmp_path / "run", [f"other{i}" for i in range(300)])
    folder, scores = rank_larger(larger, tmp_path / "run", *chain, learnt=others, display=400)
    ranking = Ranking.load(folder)
    assert ranking.order.shape == (300, 3)
    assert (np.sort(ranking.order, axis=0) == np.arange(300)[:, None]).all()
    expected = protocol.evaluate(ranking.order, dataset.ground_truth)
    for name in revisited.PROTOCOLS:
        assert scores[name]["map"] == expected[name]["map"]
    values = np.load(folder / "similarities.npy")
    assert (np.diff(values, axis=0) <= 1e-6).all()
    # Cut short, the same ranks.
    short, _ = (
        rank_larger(larger, tmp_path / "run" / "short", *chain, learnt=others)
        if ("learned" not in chain[0])
        else (folder, None)
    )
    if short != folder:
        assert len(np.load(short / "ranks.npy")) < 50
        for first, second in zip(
            Ranking.load(short).positions.ranks, ranking.positions.ranks, strict=True
        ):
            np.testing.assert_array_equal(first, second)


def split_of(run: Path, names: list[str]) -> None:
    """A finished split in which images are of 30 landmarks in turn."""
    folder = run / "split"
    with runs.stage(folder, "split", parameters={}, inputs={}) as stage:
        lines = ["path,label", *(f"a/{name}.jpg,{i % 30}" for i, name in enumerate(names))]
        (folder / "train.csv").write_text("\n".join(lines) + "\n")
        stage.finish(["train.csv"])


def test_whitening_is_learnt_from_other_images_and_stored(larger, tmp_path):
    folder, scores = rank_larger(larger, tmp_path / "run", "whitening", learnt=larger[2])
    manifest = runs.read_stage(folder, "")
    assert set(manifest["outputs"]) == {*GLOBAL_OUTPUTS, *PLAIN, *WHITENED}
    assert manifest["recorded"]["refine_set"] == str(larger[2])
    assert set(manifest["inputs"]) == {"dataset", "descriptors", "refine set"}
    assert scores["whitening"]["images"] == 300
    assert scores["whitening"]["learnt from"] == "descriptors"
    assert str(tmp_path) not in (folder / "scores.json").read_text()
    # Other images to learn from are another stage.
    rows = np.load(larger[2])
    save(larger[2], rows[:, ::-1], [f"other{i}" for i in range(300)])
    with pytest.raises(runs.StageError, match="inputs.refine set"):
        rank_larger(larger, tmp_path / "run", "whitening", learnt=larger[2])


def test_it_goes_on_after_an_interruption_and_ends_in_the_same_bytes(larger, tmp_path):
    chain = ("whitening", "augmentation neighbours=3", "expansion", "diffusion neighbours=9")
    folder, _ = rank_larger(larger, tmp_path / "one", *chain, learnt=larger[2])
    wanted = contents(folder)
    assert {"refined_database.npy", *WHITENED} < set(wanted)
    interrupt(folder)
    for name in ("scores.json", "graph_images.npy", "ranks.npy", "refined_queries.npy"):
        (folder / name).unlink()
    rank_larger(larger, tmp_path / "one", *chain, learnt=larger[2])
    assert contents(folder) == wanted
    again, _ = rank_larger(larger, tmp_path / "two", *chain, learnt=larger[2])
    assert contents(again) == wanted


def test_neighbours_from_an_index_where_exact_search_is_too_slow(larger, tmp_path, monkeypatch):
    chain = ("augmentation neighbours=3", "diffusion neighbours=9")
    exact, _ = rank_larger(larger, tmp_path / "exact", *chain, index="Flat")
    monkeypatch.setattr(rank, "MOST_EXACT", 299)
    for step in chain:
        with pytest.raises(RefinementError, match="299 images at most, not 300: set index"):
            rank_larger(larger, tmp_path / "run", step)
    folder, scores = rank_larger(larger, tmp_path / "run", *chain, index="Flat")
    assert contents(folder) == contents(exact)  # a flat index is exact
    assert {"plain", "exact", "recall"} < set(scores)
    assert not (folder / "neighbours").exists()


def test_a_chain_is_tried_on_a_finished_stage(larger, tmp_path):
    """The scores of the stage with that chain, and nothing is written."""
    dataset, _, _ = larger
    plain, scores = rank_larger(larger, tmp_path / "plain")
    before = contents(plain)
    assert rank.try_refinement(plain, dataset, [])["hard"]["map"] == scores["hard"]["map"]
    chain = ("augmentation neighbours=3", "expansion", "k_reciprocal k1=5")
    tried = rank.try_refinement(plain, dataset, chain)
    _, scores = rank_larger(larger, tmp_path / "run", *chain)
    assert tried["medium"]["ap"].tolist() == scores["medium"]["ap"]
    assert contents(plain) == before
    with pytest.raises(RefinementError, match="the stage alone does that: give the stage this ste"):
        rank.try_refinement(plain, dataset, ["whitening"])


def test_a_chain_is_tried_with_the_whitening_of_the_stage(larger, tmp_path, monkeypatch):
    dataset, _, others = larger
    chain = ("whitening power=0.25", "expansion neighbours=3")
    folder, _ = rank_larger(larger, tmp_path / "run", chain[0], learnt=others)
    _, scores = rank_larger(larger, tmp_path / "both", *chain, learnt=others)
    before = contents(folder)
    with monkeypatch.context() as patched:  # its norms are not computed again
        patched.delattr("vitgal.retrieval.refine.whitened_norms")
        tried = rank.try_refinement(folder, dataset, chain)
    assert tried["medium"]["ap"].tolist() == scores["medium"]["ap"]
    assert contents(folder) == before
    with pytest.raises(RefinementError, match="whitening is learnt from other images"):
        rank.try_refinement(folder, dataset, ["whitening power=0.5", "expansion"])


def test_norms_of_another_whitening_are_made_again(larger, tmp_path):
    chain = ("whitening", "expansion")
    folder, _ = rank_larger(larger, tmp_path / "run", *chain, learnt=larger[2])
    wanted = contents(folder)
    other, _ = rank_larger(larger, tmp_path / "other", "whitening power=0.1", learnt=larger[2])
    interrupt(folder)
    for name in ("whitening.npz", "whitened_norms.npy"):
        shutil.copy(other / name, folder)
    rank_larger(larger, tmp_path / "run", *chain, learnt=larger[2])
    assert contents(folder) == wanted


def test_a_set_of_descriptors_in_hdf5(larger, tmp_path):
    rows, names = np.load(larger[2]), [f"other{i}" for i in range(300)]
    with h5py.File(tmp_path / "o.h5", "w") as file:
        for name, row in zip(names, rows, strict=True):
            file[f"{name}.jpg/global_descriptor"] = row
    folder, _ = rank_larger(larger, tmp_path / "run", "whitening", learnt=tmp_path / "o.h5")
    other, _ = rank_larger(larger, tmp_path / "other", "whitening", learnt=larger[2])
    first, second = (np.load(f / "refined_queries.npy") for f in (folder, other))
    np.testing.assert_allclose(np.abs(first @ first.T), np.abs(second @ second.T), atol=1e-4)
    with pytest.raises(FileNotFoundError, match="there are no descriptors"):
        open_refine_set(tmp_path, GlobalSettings(refine=("whitening",)), tmp_path / "no.h5", None)


# Refusals


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ("expansion neighbours=301", "expansion wants 301 images, but there are 300"),
        ("augmentation neighbours=300", "augmentation wants 300 images, but there are 299"),
        ("diffusion neighbours=300", "diffusion wants 300 images, but there are 299"),
        ("k_reciprocal k1=301", "k_reciprocal wants 301 images"),
        ("whitening dimensions=9", "keeps 9 dimensions, but the descriptors have 8"),
    ],
)
def test_a_step_beyond_the_database_stops_before_anything_is_written(
    larger, tmp_path, chain, message
):
    with pytest.raises(RefinementError, match=message):
        rank_larger(larger, tmp_path / "run", chain, learnt=larger[2])
    assert not list((tmp_path / "run").rglob("*.npy"))


def test_a_whitening_of_the_benchmark_itself_is_refused(larger, tmp_path):
    dataset, path, others = larger
    with pytest.raises(RefinementError, match="learnt from other descriptors: set refine_set to a"):
        rank_larger(larger, tmp_path / "run", "whitening")
    with pytest.raises(RefinementError, match=r"303 of 303 images .* of the benchmark larger \(q0"):
        rank_larger(larger, tmp_path / "run", "whitening", learnt=path)
    renamed = save(tmp_path / "r.npy", np.load(path), [f"x{i}" for i in range(303)])
    with pytest.raises(RefinementError, match="303 of 303 descriptors .* are the benchmark's own"):
        rank_larger(larger, tmp_path / "run", "whitening", learnt=renamed)
    few = save(tmp_path / "f.npy", np.load(others)[:8], [f"x{i}" for i in range(8)])
    with pytest.raises(RefinementError, match="needs more images than that to learn from, not 8"):
        rank_larger(larger, tmp_path / "run", "whitening", learnt=few)
    wide = save(tmp_path / "w.npy", np.tri(40, 9), [f"x{i}" for i in range(40)])
    with pytest.raises(RefinementError, match="learnt from descriptors of 9 dimensions, these ha"):
        rank_larger(larger, tmp_path / "run", "whitening power=0", learnt=wide)
    with pytest.raises(RefinementError, match="as many pairs of images of one landmark, not 0"):
        rank_larger(larger, tmp_path / "run2", "learned_whitening", learnt=others)
    with pytest.raises(runs.StageError, match="run 01_data_split"):
        open_refine_set(tmp_path, GlobalSettings(refine=("whitening",)), None, tmp_path)


# Photographs


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """70 photographs of 35 landmarks, a folder each."""
    folder = tmp_path_factory.mktemp("photographs")
    for index in range(70):
        path = folder / f"place{index % 35:02}" / f"{index:03}.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), noise(32, 32, 100 + index))
    return folder


def test_photographs_are_described_once_for_all_data_sets(run, benchmark, weight_file, photographs):
    settings = GlobalSettings(refine=("whitening shrinkage=0.1",))
    images = open_refine_set(run, settings, photographs, None)
    assert images.source == "photographs" and len(set(images.labels.tolist())) == 35
    options = {"refine": settings.refine, "refine_set": images}
    folder = evaluate(run, benchmark, weight_file, **options)
    assert {*WHITENED, *PLAIN} < set(contents(folder))
    (described,) = (run / "refine_set").iterdir()
    rows = np.load(described / "descriptors.npy")
    assert rows.shape == (70, 64)
    stamp = (described / "descriptors.npy").stat().st_mtime_ns
    other = evaluate(run, benchmark, weight_file, folder="other", **options)
    assert contents(other) == contents(folder)
    assert (described / "descriptors.npy").stat().st_mtime_ns == stamp
    shutil.copy(benchmark / "jpg/query1.jpg", photographs / "place00" / "holiday.jpg")
    images = open_refine_set(run, settings, photographs, None)
    with pytest.raises(RefinementError, match=r"1 of 71 images .*mini \(holiday\.jpg\)"):
        evaluate(run, benchmark, weight_file, refine=settings.refine, refine_set=images)


def test_images_are_drawn_landmark_by_landmark(tmp_path):
    split_of(tmp_path, [f"im{i}" for i in range(300)])

    def draw(count: int) -> RefineSet:
        settings = GlobalSettings(refine=("whitening",), refine_images=count)
        return open_refine_set(tmp_path, settings, None, tmp_path / "train")

    some = draw(40)
    assert len(set(some.names)) == 40 and some.paths[0] == tmp_path / "train" / some.names[0]
    # 8 of each of five of the 30 landmarks, not one or two of every one.
    assert sorted(np.unique(some.labels, return_counts=True)[1].tolist()) == [8] * 5
    assert draw(40).names == some.names
    assert draw(300).names == draw(500).names and len(draw(299).names) == 299


def test_the_notebook_s_names_are_functions():
    """No sub-module hides a function of the same name once it is imported."""
    from vitgal import stages

    assert callable(stages.refine_set) and callable(stages.try_refinement)
    assert stages.open_refine_set is open_refine_set
