"""Ground truth files and data set folders: what is read, and what is refused."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.limited_memory import run_limited
from vitgal import runs
from vitgal.data import revisited
from vitgal.data.revisited import (
    GroundTruth,
    ignored,
    labelled,
    load_ground_truth,
    open_dataset,
    positives,
    write_ground_truth,
)

SHARED = Path(__file__).resolve().parents[3] / "shared"


def published(**changes):
    """A small ground truth in the published layout: 6 images, 2 queries, one without positives."""
    content = {
        "imlist": ["a", "b", "c", "d", "e", "f"],
        "qimlist": ["q0", "q1"],
        "gnd": [
            {"bbx": [1.5, 2, 30.5, 40], "easy": [3, 0], "hard": [2], "junk": [5]},
            {"bbx": [0, 0, 10, 10], "easy": [], "hard": [], "junk": [1, 2]},
        ],
    }
    return content | changes


def write_pickle(path, content):
    path.write_bytes(pickle.dumps(content))
    return path


def with_entry(**changes):
    """The small ground truth with the first query's entry changed; None removes a key."""
    content = published()
    entry = content["gnd"][0] | changes
    content["gnd"][0] = {key: value for key, value in entry.items() if value is not None}
    return content


def lists(arrays):
    return [array.tolist() for array in arrays]


# Reading and writing


def test_ground_truth_is_read_as_written_by_its_publisher(tmp_path):
    gt = load_ground_truth(write_pickle(tmp_path / "gnd_small.pkl", published()))
    assert gt.name == "small"
    assert gt.database == ["a", "b", "c", "d", "e", "f"]
    assert gt.queries == ["q0", "q1"]
    assert gt.boxes.tolist() == [[1.5, 2, 30.5, 40], [0, 0, 10, 10]]
    assert lists(gt.easy) == [[0, 3], []]
    assert gt.easy[1].dtype == np.int64


def test_positive_and_ignored_labels_by_protocol(tmp_path):
    gt = load_ground_truth(write_pickle(tmp_path / "gnd_small.pkl", published()))
    assert lists(positives(gt, "easy")) == [[0, 3], []]
    assert lists(positives(gt, "medium")) == [[0, 2, 3], []]
    assert lists(positives(gt, "hard")) == [[2], []]
    assert lists(ignored(gt, "easy")) == [[2, 5], [1, 2]]
    assert lists(ignored(gt, "medium")) == [[5], [1, 2]]
    assert lists(ignored(gt, "hard")) == [[0, 3, 5], [1, 2]]
    assert lists(labelled(gt)) == [[0, 2, 3, 5], [1, 2]]
    with pytest.raises(ValueError, match="unknown protocol 'Hard'"):
        positives(gt, "Hard")


def test_ground_truth_round_trip_keeps_content_and_bytes(tmp_path):
    gt = load_ground_truth(write_pickle(tmp_path / "gnd_small.pkl", published()))
    first = write_ground_truth(tmp_path / "gnd_again.pkl", gt)
    again = load_ground_truth(first)
    for key in ("database", "queries"):
        assert getattr(again, key) == getattr(gt, key)
    assert again.boxes.tolist() == gt.boxes.tolist()
    for label in revisited.LABELS:
        assert lists(getattr(again, label)) == lists(getattr(gt, label))
    # The second writing starts from other string objects; a pickle could tell them apart.
    second = write_ground_truth(tmp_path / "gnd_second.pkl", again)
    assert second.read_bytes() == first.read_bytes()
    assert again.fingerprint == gt.fingerprint


def test_bytes_do_not_depend_on_which_names_are_one_object(tmp_path):
    none = [np.empty(0, np.int64)]
    name = "church 1"
    written = [
        write_ground_truth(
            tmp_path / f"gnd_{i}.pkl",
            GroundTruth("x", [name], [query], np.array([[0.0, 0, 1, 1]]), none, none, none),
        ).read_bytes()
        for i, query in enumerate((name, " ".join(name.split())))
    ]
    assert written[0] == written[1]


def test_written_ground_truth_holds_the_official_keys_in_builtins(tmp_path):
    gt = load_ground_truth(write_pickle(tmp_path / "gnd_small.pkl", published()))
    content = pickle.loads(write_ground_truth(tmp_path / "gnd_again.pkl", gt).read_bytes())
    assert set(content) == {"imlist", "qimlist", "gnd"}
    assert content["gnd"][0] == {
        "bbx": [1.5, 2.0, 30.5, 40.0],
        "easy": [0, 3],
        "hard": [2],
        "junk": [5],
    }
    assert type(content["gnd"][0]["easy"][0]) is int


def test_ground_truth_without_queries_is_read(tmp_path):
    content = published(qimlist=[], gnd=[])
    gt = load_ground_truth(write_pickle(tmp_path / "gnd_none.pkl", content))
    assert gt.boxes.shape == (0, 4)
    assert labelled(gt) == []


def test_fingerprint_depends_on_labels(tmp_path):
    gt = load_ground_truth(write_pickle(tmp_path / "gnd_a.pkl", published()))
    other = load_ground_truth(write_pickle(tmp_path / "gnd_b.pkl", with_entry(easy=[0], hard=[2])))
    assert gt.fingerprint != other.fingerprint


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the official ground truth in ../shared")
@pytest.mark.parametrize(
    ("name", "images", "without_easy"), [("roxford5k", 4993, [11, 66]), ("rparis6k", 6322, [])]
)
def test_official_ground_truth(name, images, without_easy):
    gt = load_ground_truth(SHARED / "data" / "revisited" / f"gnd_{name}.pkl")
    assert (gt.name, len(gt.database), len(gt.queries)) == (name, images, 70)
    assert [q for q, easy in enumerate(gt.easy) if not easy.size] == without_easy


# Refused ground truth


class Malicious:
    """Unpickling this makes a folder."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_pickle_that_runs_code_is_refused_before_it_runs(tmp_path):
    # The payload works where pickle is trusted ...
    pickle.loads(pickle.dumps(published(imlist=Malicious(tmp_path / "proof"))))
    assert (tmp_path / "proof").is_dir()
    # ... and does nothing here.
    path = write_pickle(tmp_path / "gnd_evil.pkl", published(imlist=Malicious(tmp_path / "harm")))
    with pytest.raises(ValueError, match=r"gnd_evil\.pkl is refused.*mkdir"):
        load_ground_truth(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", [np.array([0, 3]), [np.int64(3)], np.array([0.0, 3.0])])
def test_numpy_pickles_are_refused_with_a_remedy(tmp_path, value, protocol):
    path = tmp_path / "gnd_small.pkl"
    path.write_bytes(pickle.dumps(with_entry(easy=value), protocol=protocol))
    with pytest.raises(
        ValueError, match=r"numpy arrays.*own with vitgal\.data\.write_ground_truth"
    ):
        load_ground_truth(path)


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_is_read(tmp_path, protocol):
    path = tmp_path / "gnd_small.pkl"
    path.write_bytes(pickle.dumps(with_entry(bbx=(1, 2, 3, 4)), protocol=protocol))
    assert load_ground_truth(path).boxes[0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "content", [b"", b"<html>Not found</html>", pickle.dumps(published())[:90]]
)
def test_damaged_pickle_is_refused(tmp_path, content):
    (tmp_path / "gnd_small.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"gnd_small\.pkl is refused"):
        load_ground_truth(tmp_path / "gnd_small.pkl")


def test_missing_ground_truth_names_the_download(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gnd_rparis6k.*vitgal download rparis6k"):
        load_ground_truth(tmp_path / "gnd_rparis6k.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no imlist and no qimlist and no gnd"),
        ({"imlist": ["a"], "qimlist": []}, "no gnd"),
        (published(imlist="abc"), "imlist must be a list of image names"),
        (published(imlist=["a", 7]), "imlist must be a list of image names"),
        (published(imlist=["a", "b", "c", "a", "e", "f"]), "database list names an image twice: a"),
        (published(qimlist=["q0", "q0"]), "query list names an image twice: q0"),
        (published(qimlist=["q0"]), "each of 1 queries"),
        (published(gnd=[[], []]), "one dict for each of 2 queries"),
        (with_entry(bbx=None), r"query 0 \(q0\) needs a box .*None"),
        (with_entry(bbx=[1, 2, 3]), r"query 0 \(q0\) needs a box .*\[1, 2, 3\]"),
        (with_entry(bbx="1 2 3 4"), "needs a box .*'1 2 3 4'"),
        (with_entry(bbx=[0, 0, 1, 10**400]), r"query 0 \(q0\) .*beyond any image"),
        (with_entry(bbx=[-1, 0, 5, 5]), r"query 0 \(q0\) has the box .*negative"),
        (with_entry(bbx=[0, 0, float("nan"), 5]), "nan"),
        (with_entry(bbx=[30, 2, 1, 40]), "holds no pixel"),
        (with_entry(bbx=[1, 2, 1.9, 40]), "holds no pixel"),
        (with_entry(junk=None), r"query 0 \(q0\) needs a list junk"),
        (with_entry(easy=[0, 1.0]), "needs a list easy of integers"),
        (with_entry(easy=[True]), "needs a list easy of integers"),
        (with_entry(easy=[6]), r"query 0 \(q0\) has the easy index 6.*6 images \(0 to 5\)"),
        (with_entry(hard=[-1]), "hard index -1"),
        (with_entry(easy=[1 << 80]), r"query 0 \(q0\) .*beyond any image"),
        (with_entry(easy=[2], hard=[2]), r"query 0 \(q0\) labels the database image 2 twice"),
    ],
)
def test_wrong_ground_truth_is_named(tmp_path, content, message):
    path = write_pickle(tmp_path / "gnd_small.pkl", content)
    with pytest.raises(ValueError, match=message) as caught:
        load_ground_truth(path)
    assert str(path) in str(caught.value)


WHOLE = pickle.dumps(published(), protocol=revisited.PICKLE_PROTOCOL)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just("gnd"),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=3), values),
    max_leaves=8,
)
EDITS = st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(max_size=5)), max_size=4)


def check_read_or_refused(path, data):
    path.write_bytes(data)
    try:
        gt = load_ground_truth(path)
    except ValueError as error:
        assert path.name in str(error)
    else:
        revisited.check_ground_truth(gt)
        assert len(gt.boxes) == len(gt.queries) == len(labelled(gt))


@given(head=st.sampled_from([b"", b"\x80\x04"]), data=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory, head, data):
    check_read_or_refused(tmp_path_factory.getbasetemp() / "gnd_bytes.pkl", head + data)


@settings(max_examples=200)
@given(edits=EDITS, length=st.integers(0, len(WHOLE)) | st.just(len(WHOLE)))
def test_a_changed_file_is_read_or_refused(tmp_path_factory, edits, length):
    data = bytearray(WHOLE)
    for position, replacement in edits:
        data[position : position + len(replacement)] = replacement
    path = tmp_path_factory.getbasetemp() / "gnd_changed.pkl"
    check_read_or_refused(path, bytes(data[:length]))


@given(st.sampled_from(["imlist", "qimlist", "gnd", "bbx", "easy", "hard", "junk"]), VALUES)
def test_any_value_in_place_of_another_is_read_or_refused(tmp_path_factory, key, value):
    content = published(**{key: value}) if key in published() else with_entry(**{key: value})
    path = tmp_path_factory.getbasetemp() / "gnd_value.pkl"
    check_read_or_refused(path, pickle.dumps(content))


def nested(value, times):
    for _ in range(times):
        value = [value] * 10
    return value


def greedy_pickles():
    """Small files that ask for memory, depth or time."""
    named = pickle.dumps(with_entry(easy="DEEP"), protocol=3)
    tuples = b"K\x01\x85\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60))
    several = {"imlist": [f"i{i}" for i in range(9000)], "qimlist": [f"q{i}" for i in range(9000)]}
    entry = {"bbx": [0, 0, 1, 1], "easy": list(range(9000)), "hard": [], "junk": []}
    return [
        named.replace(b"X\x04\0\0\0DEEP", b"]" * 5000 + b"a" * 4999),
        b"\x80\x04" + b"(" * 100_000 + b".",
        b"K\x01r\xff\xff\xff\x7f.",  # the compiled unpickler's table would take 34 GB
        *(
            b"\x80\x05" + code + (8 << 30).to_bytes(8, "little") + b"."
            for code in (pickle.FRAME, pickle.BINBYTES8, pickle.BINUNICODE8, pickle.BYTEARRAY8)
        ),
        b"\x80\x04\x8b\xff\xff\xff\x7f.",
        *(  # dicts and sets of tuples: 2 ** 60 numbers to hash
            b"\x80\x04" + start + tuples + end
            for start, end in (
                (b"}", b"K\x01s."),
                (b"}(", b"K\x01u."),
                (b"(", b"K\x01d."),
                (b"(", b"\x91."),
                (b"\x8f(", b"\x90."),
            )
        ),
        pickle.dumps(with_entry(bbx=nested(1, 40))),
        pickle.dumps(with_entry(easy=nested("a", 40))),
        pickle.dumps(published(imlist=nested("a", 40))),
        pickle.dumps(with_entry(bbx=[10**4000] * 3)),
        b"F" + b"x" * 3_000_000 + b"\n.",
        pickle.dumps(published(qimlist=["q" * 3_000_000, "q1"])),
        pickle.dumps(several | {"gnd": [entry] * 9000}),  # 81 million labels
    ]


def test_a_small_file_takes_no_memory_and_no_time(tmp_path):
    for i, data in enumerate(greedy_pickles()):
        (tmp_path / f"gnd_{i}.pkl").write_bytes(data)
    printed = run_limited(
        "from vitgal.data.revisited import load_ground_truth",
        """
for path in sys.argv[1:]:
    try:
        load_ground_truth(path)
    except ValueError as error:
        assert str(error).startswith(path) and len(str(error)) < 700, str(error)[:2000]
        print("refused")
""",
        *sorted(tmp_path.iterdir()),
    )
    assert printed.count("refused") == len(greedy_pickles())


def test_unreadable_content_is_not_written(tmp_path):
    empty = [np.empty(0, np.int64)]
    gt = GroundTruth("x", ["a"], ["q"], np.zeros((1, 4)), empty, empty, empty)
    with pytest.raises(ValueError, match="holds no pixel"):
        write_ground_truth(tmp_path / "gnd_x.pkl", gt)
    assert list(tmp_path.iterdir()) == []


# Folders


def make_folder(folder, content=None, *, name="small"):
    """A benchmark folder whose images hold their own names; nothing decodes them here."""
    content = content or published()
    (folder / "jpg").mkdir(parents=True)
    write_pickle(folder / f"gnd_{name}.pkl", content)
    for image in content["imlist"] + content["qimlist"]:
        (folder / "jpg" / f"{image}.jpg").write_text(image)
    return folder


def make_distractors(folder, names=("10/z.jpg", "2/a.jpg"), *, listed="revisitop1m.txt"):
    for name in names:
        (folder / "jpg" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "jpg" / name).write_text(name)
    (folder / listed).write_text("".join(f"{name}\n" for name in names))
    return folder


def test_data_set_lists_names_and_paths_in_the_order_of_the_indices(tmp_path):
    folder = make_folder(tmp_path / "set")
    dataset = open_dataset("small", folder)
    assert dataset.name == "small"
    assert dataset.database == ["a", "b", "c", "d", "e", "f"]
    assert dataset.database_paths[2] == folder / "jpg" / "c.jpg"
    assert dataset.query_paths == [folder / "jpg" / "q0.jpg", folder / "jpg" / "q1.jpg"]


def test_distractors_follow_in_their_list_s_order(tmp_path):
    folder, more = make_folder(tmp_path / "set"), make_distractors(tmp_path / "more")
    dataset = open_dataset("small", folder, distractors=more)
    assert dataset.database[6:] == ["10/z.jpg", "2/a.jpg"]  # not 2 before 10, not sorted
    assert dataset.database_paths[6:] == [more / "jpg/10/z.jpg", more / "jpg/2/a.jpg"]
    assert len(dataset.ground_truth.database) == 6
    (more / "revisitop1m.txt").write_text("2/a.jpg\n\n10/z.jpg")
    dataset = open_dataset("small", folder, distractors=more)
    assert dataset.database[6:] == ["2/a.jpg", "10/z.jpg"]


def test_missing_distractor_list_is_an_error_not_a_walk(tmp_path):
    folder, more = (
        make_folder(tmp_path / "set"),
        make_distractors(tmp_path / "more", listed="x.txt"),
    )
    with pytest.raises(FileNotFoundError, match="revisitop1m.txt.*vitgal download revisitop1m"):
        open_dataset("small", folder, distractors=more)


def test_missing_images_are_counted_and_the_first_named(tmp_path):
    folder = make_folder(tmp_path / "set")
    for name in "bcdf":
        (folder / "jpg" / f"{name}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"4 of 6 .*small.*: b\.jpg, c\.jpg, d\.jpg, …;"):
        open_dataset("small", folder)


def test_missing_query_and_missing_distractor_are_named(tmp_path):
    folder, more = make_folder(tmp_path / "set"), make_distractors(tmp_path / "more")
    (more / "jpg/2/a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 .*revisitop1m.*2/a\.jpg;"):
        open_dataset("small", folder, distractors=more)
    (folder / "jpg" / "q1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 .*q1\.jpg;"):
        open_dataset("small", folder)


def test_missing_folder_names_the_download(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; `vitgal download roxford5k`"):
        open_dataset("roxford5k", tmp_path / "absent")
    (tmp_path / "half" / "jpg").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="gnd_roxford5k.*`vitgal download roxford5k`"):
        open_dataset("roxford5k", tmp_path / "half")
    with pytest.raises(FileNotFoundError, match="has no folder jpg/; a benchmark folder holds"):
        open_dataset("mine", tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_a_distractor_list_of_another_encoding_is_read_or_refused(tmp_path, encoding):
    folder = make_folder(tmp_path / "set")
    more = make_distractors(tmp_path / "more", ["1/é.jpg", "1/b.jpg"])
    (more / "revisitop1m.txt").write_text("1/é.jpg\r\n1/b.jpg\r\n", encoding=encoding)
    if encoding == "utf-16-le":  # no byte order mark
        with pytest.raises(ValueError, match=r"revisitop1m\.txt is no text in UTF-8"):
            open_dataset("small", folder, distractors=more)
    else:
        dataset = open_dataset("small", folder, distractors=more)
        assert dataset.database[-2:] == ["1/é.jpg", "1/b.jpg"]


def test_wrong_endings_are_reported_with_a_remedy(tmp_path):
    folder = make_folder(tmp_path / "set")
    (folder / "jpg" / "b.jpg").rename(folder / "jpg" / "b.png")
    with pytest.raises(FileNotFoundError, match=r"b\.png is there: rename it to b\.jpg, whatever"):
        open_dataset("small", folder)
    write_pickle(folder / "gnd_small.pkl", published(imlist=[f"{name}.jpg" for name in "abcdef"]))
    with pytest.raises(FileNotFoundError, match=r"a\.jpg is there: list the names without \.jpg"):
        open_dataset("small", folder)
    folder, more = make_folder(tmp_path / "two"), make_distractors(tmp_path / "more")
    (more / "revisitop1m.txt").write_text("2/a\n")
    with pytest.raises(FileNotFoundError, match=r"a\.jpg is there: list the whole name"):
        open_dataset("small", folder, distractors=more)


def test_impossible_file_names_are_missing(tmp_path):
    folder, more = make_folder(tmp_path / "set"), make_distractors(tmp_path / "more")
    for name in ("x" * 300 + "/a.jpg", "a\x1b[2J/b.jpg", "c\u202e/d.jpg"):
        (more / "revisitop1m.txt").write_text(name)
        with pytest.raises(FileNotFoundError, match="1 of 1") as caught:
            open_dataset("small", folder, distractors=more)
        assert str(caught.value).isprintable()
    # A name that is no UTF-8 is refused also where the file is there.
    (folder / "jpg" / "caf\udce9.jpg").write_bytes(b"x")
    write_pickle(folder / "gnd_small.pkl", published(imlist=["caf\udce9", *"bcdef"]))
    with pytest.raises(ValueError, match=r"caf\\+udce9\.jpg' is no UTF-8: rename the file"):
        open_dataset("small", folder)


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path):
    folder, more = make_folder(tmp_path / "set"), make_distractors(tmp_path / "more")
    for name in ("../set/jpg/a.jpg", str(folder / "jpg" / "a.jpg")):
        (more / "revisitop1m.txt").write_text(name)
        with pytest.raises(ValueError, match="revisitop1m lists a name that cannot be used"):
            open_dataset("small", folder, distractors=more)


def test_image_listed_twice_is_refused(tmp_path):
    folder = make_folder(tmp_path / "set")
    more = make_distractors(tmp_path / "more", ("1/x.jpg", "1/x.jpg"))
    with pytest.raises(ValueError, match=r"twice: 1/x\.jpg"):
        open_dataset("small", folder, distractors=more)


def test_query_that_is_in_the_database_is_refused(tmp_path):
    folder = make_folder(tmp_path / "set", published(qimlist=["q0", "c"]))
    with pytest.raises(ValueError, match=r"database as well \(c\)"):
        open_dataset("small", folder)


def test_many_images_are_looked_up_once_for_opening_and_the_first_stage(tmp_path, monkeypatch):
    folder, more = make_folder(tmp_path / "set"), make_distractors(tmp_path / "more")
    few = open_dataset("small", folder, distractors=more)
    assert not few.stamps and not few.verify
    monkeypatch.setattr(runs, "MANY", 5)
    many = open_dataset("small", folder, distractors=more, verify=True)
    assert many.as_input.verify and many.stamps
    assert many.as_input.stamp() == few.as_input.stamp()
    (more / "jpg/10/z.jpg").write_text("another image")  # seen by the next stage
    assert many.as_input.stamp() == few.as_input.stamp()
    (more / "jpg/10/z.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 .*revisitop1m.*10/z\.jpg;"):
        open_dataset("small", folder, distractors=more)
    (more / "jpg/10/z.jpg").mkdir()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 .*revisitop1m.*10/z\.jpg;"):
        open_dataset("small", folder, distractors=more)


def test_a_data_set_as_input_follows_content_and_is_stamped_without_reading(tmp_path):
    dataset = open_dataset("small", make_folder(tmp_path / "one"))
    moved = open_dataset("small", make_folder(tmp_path / "two"))
    fingerprint = dataset.as_input.fingerprint()
    stamp = moved.as_input.stamp()
    assert moved.as_input.fingerprint() == fingerprint
    assert moved.as_input.stamp() == stamp
    moved.database_paths[4].write_text("another image")
    assert moved.as_input.stamp() != stamp
    assert moved.as_input.fingerprint() != fingerprint
    more = make_distractors(tmp_path / "more")
    larger = open_dataset("small", tmp_path / "one", distractors=more)
    assert larger.as_input.fingerprint() != fingerprint
