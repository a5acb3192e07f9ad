"""Stored faiss indexes against exact search, and what a ranking is that begins with one."""

import subprocess
import sys

import numpy as np
import pytest

from vitgal import runs
from vitgal.retrieval import exact_ranks, exact_search, faiss_index
from vitgal.retrieval.ranking import Positions

WIDTH = 32


def clustered(number, *, seed=0):
    """Unit vectors around 40 directions: what an index can divide into cells."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((40, WIDTH))
    rows = centres[generator.integers(40, size=number)]
    rows = rows + 0.6 * generator.standard_normal((number, WIDTH))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("descriptors") / "database.npy"
    np.save(path, clustered(3000))
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("Flat", 1.0),
        ("IVF32,Flat; nprobe=32", 1.0),  # every cell
        ("IVF32,Flat; nprobe=1", 0.2),
        # Codes of 4 and 16 bytes for 128; 1 % would be found by chance (40 proposed of 3000).
        ("IVF32,PQ8x4; nprobe=32", 0.6),
        ("IVF32,PQ8; nprobe=32", 0.6),  # faiss's table of distances is larger than the file
        ("HNSW16; efSearch=200", 0.95),
        ("PCA16,IVF16,SQ8; nprobe=16", 0.4),
    ],
)
def test_index_finds_what_exact_search_finds(tmp_path, database, text, least):
    queries = clustered(20, seed=1)
    exact = exact_search.search(queries, database, k=10)
    similarities, ranks, unanswered = faiss_index.find(
        faiss_index.build(tmp_path, database, text), queries, k=10
    )
    assert unanswered == 0 and ranks.dtype == np.int32 and similarities.shape == (10, 20)
    assert faiss_index.recall(ranks, exact[1])["10"] >= least
    if least == 1:
        np.testing.assert_array_equal(ranks, exact[1])
        np.testing.assert_array_equal(similarities, exact[0])
    # What is found stands in exact order with exact similarities, whatever the codes are.
    for q in range(20):
        assert (
            similarities[:, q] == exact_search.similarities(queries[q], database, ranks[:, q])
        ).all()
        assert (np.diff(similarities[:, q]) <= 0).all()


def test_fewer_cells_find_less(tmp_path, database):
    queries = clustered(50, seed=2)
    exact = exact_search.search(queries, database, k=10)[1]
    result = []
    for text in ("IVF64,Flat; nprobe=1", "IVF64,Flat", "IVF64,Flat; nprobe=64"):
        index = faiss_index.build(tmp_path, database, text)
        result.append(faiss_index.recall(faiss_index.find(index, queries, k=10)[1], exact)["10"])
    assert result[0] < result[1] < result[2] == 1


@pytest.mark.parametrize(("text", "rows"), [("IVF16,PQ8x4", 700), ("HNSW8", 4096)])
def test_the_same_bytes_again(tmp_path, database, text, rows, monkeypatch):
    first, second = tmp_path / "one", tmp_path / "two"
    faiss_index.build(first, database, text, seed=3)
    monkeypatch.setattr(faiss_index, "ADDED", rows)
    second.mkdir()
    for name in faiss_index.OUTPUTS:  # of an interrupted stage, or of anybody
        (second / name).write_bytes(b"torn")
    faiss_index.build(second, database, text, seed=3)
    for name in faiss_index.OUTPUTS:
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("text", ["PQ8x4", "IVF32,PQ8x4", "PCA16,IVF16,PQ8x4", "PCA16,PQ8x4"])
def test_codes_get_the_seed_and_no_polysemous_training(text):
    """That training takes longer than all the rest and serves a search that is not used."""
    index = faiss_index.new_index(text, WIDTH)
    faiss_index.set_seeds(index, 6)
    inner = faiss_index._inner_index(index)
    assert inner.pq.cp.seed == 7 and not inner.do_polysemous_training


def test_a_graph_keeps_as_many_images_as_are_wanted(tmp_path, database):
    """With faiss's 16 it would propose too few, and every query would be searched exactly."""
    queries = clustered(20, seed=1)
    index = faiss_index.build(tmp_path, database, "HNSW16")
    _, ranks, unanswered = faiss_index.find(index, queries, k=700)
    assert unanswered == 0
    exact = exact_search.search(queries, database, k=700)[1]
    assert faiss_index.recall(ranks, exact, (700,))["700"] > 0.95


def test_the_record_states_what_an_index_depends_on(tmp_path, database):
    def recorded(rows, text, seed=0):
        faiss_index.build(tmp_path, rows, text, seed=seed)
        return runs.read_json(tmp_path / "index.json")

    first, other = recorded(database, "IVF16,Flat"), np.array(database)
    other[7, 3] += 1e-6
    changes = {
        "descriptors": recorded(other, "IVF16,Flat"),
        "factory": recorded(database, "IVF8,Flat"),
        "seed": recorded(database, "IVF16,Flat", 1),
    }
    for name, record in changes.items():
        assert {key for key in first if record[key] != first[key]} - {"bytes"} == {name}
    assert first["shape"] == [3000, WIDTH] and first["type"] == "<f4"


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "IVF", "PQ7", "IVF16,Flat; efSearch=3", "Flat; depth"],
)
def test_texts_that_are_no_index_are_refused(text):
    with pytest.raises(ValueError, match=r"no index .*faiss reports .*IVF1024,Flat"):
        faiss_index.check(text, WIDTH)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("IVF64,Flat", "inverted file of 50 images has 1 to 50 cells"),
        ("IVF0,Flat", "1 to 50 cells"),
        ("IVF999999999,Flat", "1 to 50 cells"),
        ("IVF8,Flat; nprobe=0", "nprobe is 0"),
        ("IVF8,Flat; nprobe=-1", "nprobe is -1"),
        ("IVF8,Flat; nprobe=nan", "nprobe is nan"),
        ("IVF8,Flat; nprobe=", "nprobe is "),
        ("IVF8,PQ4; nprobe=2", "256 codes cannot be learnt from 50 images"),
        ("PQ4x6", "64 codes cannot be learnt from 50"),
        ("IDMap,Flat", "own numbers"),
        ("HNSW0", "2 others"),  # faiss ends the process when the first image is added
        ("NSG1", "2 others"),
    ],
)
def test_invalid_indexes_are_refused_before_images_are_described(text, reason):
    with pytest.raises(ValueError, match=rf"no index '{text}': .*{reason}.*for example"):
        faiss_index.check(text, WIDTH, 50)


def test_what_fits_just_so_is_built(tmp_path, database):
    for text in ("IVF50,Flat", "PQ4x5", "HNSW2"):
        faiss_index.check(text, WIDTH, 50)
        index = faiss_index.build(tmp_path, database[:50], text)
        assert faiss_index.find(index, database[:3], k=1)[1].tolist() == [[0, 1, 2]]
    with pytest.raises(ValueError, match="1 to 16777216 cells"):
        faiss_index.check("IVF999999999,Flat", WIDTH)


MAPPED = """
import sys
import numpy as np
from vitgal.retrieval import faiss_index
database = np.load(sys.argv[2], mmap_mode="r")

def held():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

faiss_index.build(sys.argv[1], database[:99], "HNSW4")
before = held()
index = faiss_index.build(sys.argv[1], database, "HNSW4")
assert faiss_index.find(index, database[:1], k=1)[1].shape == (1, 1)
print(held() - before)
"""


@pytest.mark.slow
def test_a_graph_is_mapped_not_read(tmp_path):
    """20,000 descriptors of 256 numbers are 20 MB, which stay in the file."""
    rows = np.random.default_rng(0).standard_normal((20_000, 256), np.float32)
    np.save(tmp_path / "rows.npy", rows)
    arguments = [sys.executable, "-c", MAPPED, tmp_path / "index", tmp_path / "rows.npy"]
    child = subprocess.run(arguments, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 8000  # kB


def test_another_way_of_building_is_another_index(tmp_path, database):
    text = "HNSW8; efConstruction={}"
    faiss_index.build(tmp_path, database, text.format(4))
    first = (tmp_path / "index.faiss").read_bytes()
    faiss_index.build(tmp_path, database, text.format(80))
    other = (tmp_path / "index.faiss").read_bytes()
    assert first != other


def test_databases_that_cannot_be_indexed_are_refused(tmp_path, database):
    with pytest.raises(ValueError, match="empty database"):
        faiss_index.build(tmp_path, database[:0], "Flat")
    with pytest.raises(ValueError, match="'IVF64,Flat': .* 50 images"):
        faiss_index.build(tmp_path, database[:50], "IVF64,Flat")
    bad = np.array(database)
    bad[2500, 1] = np.nan
    with pytest.raises(ValueError, match="database image 2500 is not finite"):
        faiss_index.build(tmp_path, bad, "Flat")
    with pytest.raises(ValueError, match="2-D array of floats"):
        faiss_index.build(tmp_path, np.zeros(5), "Flat")
    assert not list(tmp_path.iterdir())


def test_queries_that_do_not_fit_are_refused(tmp_path, database):
    index = faiss_index.build(tmp_path, database, "Flat")
    with pytest.raises(ValueError, match="queries have 31 dimensions and the database 32"):
        faiss_index.find(index, np.ones((2, 31), np.float32), k=1)
    with pytest.raises(ValueError, match="query 1 is not finite"):
        faiss_index.find(index, np.array([[0.0] * 32, [np.inf] * 32]), k=1)
    with pytest.raises(ValueError, match="k is 0"):
        faiss_index.find(index, np.ones((2, 32)), k=0)
    none = faiss_index.find(index, np.empty((0, 32), np.float32), k=5)
    assert none[0].shape == none[1].shape == (5, 0) and none[2] == 0
    assert faiss_index.recall(none[1], none[1]) == {"1": None}


def test_one_image_and_more_wanted_than_there_are(tmp_path, database):
    index = faiss_index.build(tmp_path, database[:1], "Flat")
    similarities, ranks, _ = faiss_index.find(index, database[:1], k=5)
    assert ranks.tolist() == [[0]] and similarities == pytest.approx(1)


def test_queries_that_get_too_few_are_searched_exactly(tmp_path, database):
    # One cell of 64 holds about 50 images: no query can get its 500 from it.
    queries = clustered(7, seed=4)
    index = faiss_index.build(tmp_path, database, "IVF64,Flat; nprobe=1")
    similarities, ranks, unanswered = faiss_index.find(index, queries, k=500)
    assert unanswered == 7
    expected = exact_search.search(queries, database, k=500)
    np.testing.assert_array_equal(ranks, expected[1])
    np.testing.assert_array_equal(similarities, expected[0])


def test_image_that_could_not_be_read_is_last_among_those_found(tmp_path):
    rows = np.array([[0, 0], [-1, 0], [0, 1], [1, 0]], np.float32)
    index = faiss_index.build(tmp_path, rows, "Flat")
    assert faiss_index.find(index, rows[3:], k=4)[1].ravel().tolist() == [3, 2, 1, 0]


def test_positions_behind_a_list_by_hand():
    database = np.array([[9], [8], [7], [6], [5], [4], [7]], np.float32)
    query = np.ones((1, 1), np.float32)
    # The exact order is 0 1 2 6 3 4 5; the list found 1, 6, 4, so the ranking is 1 6 4 0 2 3 5.
    exact = Positions([np.array([0, 2, 3, 4, 6])], [np.array([0, 2, 4, 5, 3])], 7)
    ranks = np.array([[1], [6], [4]], np.int32)
    behind = faiss_index.positions_behind(exact, database[ranks[:, 0]], ranks, query, database)
    assert behind.ranks[0].tolist() == [3, 4, 5, 2, 1]
    empty = faiss_index.positions_behind(exact, database[:0], ranks[:0], query, database)
    assert empty.ranks[0].tolist() == exact.ranks[0].tolist()


def test_positions_behind_a_list_equal_the_ranking_written_out(tmp_path, database):
    queries = clustered(6, seed=5)
    generator = np.random.default_rng(0)
    labels = [np.sort(generator.choice(3000, 40, replace=False)) for _ in queries]
    index = faiss_index.build(tmp_path, database, "IVF64,Flat; nprobe=4")
    similarities, ranks, _ = faiss_index.find(index, queries, k=30)
    exact = exact_ranks.labelled_positions(queries, database, labels)
    full = exact_search.search(queries, database, k=3000)[1]
    written = np.array(
        [
            [*ranks[:, q], *(image for image in full[:, q] if image not in ranks[:, q])]
            for q in range(6)
        ]
    ).T
    expected = Positions.from_ranks(written, labels)
    behind = faiss_index.positions_behind(exact, similarities, ranks, queries, database)
    assert any((a != b).any() for a, b in zip(exact.ranks, behind.ranks, strict=True))
    for actual, reference in zip(behind.ranks, expected.ranks, strict=True):
        np.testing.assert_array_equal(actual, reference)


def test_recall_by_hand():
    exact = np.array([[0, 5], [1, 6], [2, 7]])
    result = np.array([[0, 6], [9, 5], [1, 8]])
    assert faiss_index.recall(result, exact, depths=(1, 2, 3, 10)) == {
        "1": 0.5,  # of the first: found, not found
        "2": 0.75,  # 0 of 0 1; 6 and 5 of 5 6
        "3": pytest.approx((2 / 3 + 2 / 3) / 2),
    }


FULL_DISK = """
import resource, signal, sys
import numpy as np
from vitgal.retrieval import faiss_index
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    faiss_index.build(sys.argv[1], np.ones((500, 32), np.float32), "Flat")
except OSError as error:
    print(error)
"""


def test_a_full_disk_leaves_no_index(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True
    )
    assert "no space left to write index.faiss" in child.stdout, child.stderr
    assert not list(tmp_path.iterdir())


TORCH_BESIDE = """
import sys
import numpy as np
from vitgal.retrieval import faiss_index
for name in sys.argv[2:]:
    if name == "torch":
        import torch
        torch.set_num_threads(2)
        a = torch.ones(512, 512)
        assert (a @ a)[0, 0] == 512
    else:
        rows = np.eye(64, dtype=np.float32)
        index = faiss_index.build(sys.argv[1], rows, "IVF4,Flat; nprobe=4")
        assert faiss_index.find(index, rows, k=1)[1].ravel().tolist() == list(range(64))
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", [("torch", "faiss", "torch"), ("faiss", "torch", "faiss")])
def test_torch_and_faiss_share_a_process(tmp_path, order):
    command = [sys.executable, "-c", TORCH_BESIDE, tmp_path, *order]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert child.stdout == "done\n", child.stderr
