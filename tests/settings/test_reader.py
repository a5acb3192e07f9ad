"""Settings from YAML, a notebook's namespace and the command line: one reader, one result."""

import dataclasses
import json
import math
import string
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from vitgal import runs
from vitgal.settings import reader, sections
from vitgal.settings.section import SettingsError, conform, yaml_number


@pytest.mark.parametrize(
    ("value", "kind", "kept"),
    [
        (3, float, 3.0),
        (None, float | None, None),
        ([1, 0.5], tuple[float, ...], (1.0, 0.5)),
        ([1, 0.5], list[float], [1.0, 0.5]),
        ([], tuple[int, ...], ()),
        ("null", str | None, "null"),
        (False, bool, False),
    ],
)
def test_conform_keeps(value, kind, kept):
    result = conform("it", value, kind)
    assert result == kept
    assert type(result) is type(kept)  # 3 == 3.0, and True == 1


@pytest.mark.parametrize(
    ("value", "kind", "remedy"),
    [
        (True, int, "bool"),
        (1, bool, "int"),
        (3.0, int, "float"),
        (None, float, "null is only for"),
        ("1e-3", float, "write 1.0e-3"),
        ("1e3", float | None, "write 1.0e+3"),
        ("0.5", float, "write 0.5"),
        (math.nan, float, "nan"),
        (math.inf, float, "inf"),
        ([1.5], tuple[int, ...], "1.5"),
        (1.5, tuple[float, ...], "tuple"),
        ("text", int, "text"),
    ],
)
def test_conform_refuses(value, kind, remedy):
    with pytest.raises(SettingsError, match="^it: ") as error:
        conform("it", value, kind)
    assert remedy in str(error.value)


@pytest.mark.parametrize("text", ["1e-3", "1e3", "1.5e3", "2.e+1", ".5e1"])
def test_the_remedy_is_a_number_to_yaml(text):
    assert yaml.safe_load(yaml_number(text)) == float(text)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("1e-3", float, 0.001),
        ("2", float, 2.0),
        ("-1", int, -1),
        ("007", str, "007"),
        ("null", str | None, None),
        ("none", str | None, "none"),
        ("true", bool, True),
        ("0.7071,1,1.4142", tuple[float, ...], [0.7071, 1.0, 1.4142]),
        ("[0.5, 1]", list[float], [0.5, 1.0]),
        ("['a', b]", list[str], ["a", "b"]),
        ("[]", tuple[int, ...], []),
        ("10,20,30,40", tuple[int, ...] | None, [10, 20, 30, 40]),
    ],
)
def test_text_is_read_by_the_type(text, kind, value):
    assert reader.parse_text(text, kind) == value


@pytest.mark.parametrize(
    ("text", "kind"), [("1.5", int), ("yes", bool), ("null", float), ("nan", float)]
)
def test_text_of_another_type_is_refused(text, kind):
    with pytest.raises(SettingsError, match=text):
        reader.parse_text(text, kind)


# YAML files


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "near.yaml").write_text("seed: 1")
    with pytest.raises(FileNotFoundError, match=r"nothing.yaml.*near.yaml"):
        reader.read_file(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only a comment\n",
        "- a\n",
        "text\n",
        "b: {c: 2}\n",
        "a: 1\na: 2\n",
        "a: [1\n",
        "\tb: 2\n",
    ],
)
def test_a_file_that_is_no_flat_mapping(tmp_path, text):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match="a.yaml"):
        reader.read_file(file)


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 8)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
WRONG = {
    "no text": (b"a: \xff\xfe", "invalid start byte"),
    "binary": (bytes(range(128)) * 9, "special characters are not allowed"),
    "UTF-16 without a mark": ("seed: 1\n".encode("utf-16-le"), "not allowed"),
    "nested references": (BOMB.encode(), "it has a reference"),
    "one reference": (b"a: &a 1\nb: *a\n", "it has a reference"),
    "a list of itself": (b"a: &a [*a]\n", "it has a reference"),
    "merged": (b"<<: {seed: 1}\nseed: 2\n", "gives 'seed' 2 times"),
    "deep lists": (b"a: " + b"[" * 40_000, "it is nested"),
    "deep mappings": (b"a: " + b"{a: " * 20_000, "it is nested"),
    "deep by indentation": ("".join(" " * n + "a:\n" for n in range(300)).encode(), "nested"),
    "a bad date": (b"a: 2019-02-31\n", "day is out of range"),
    "a wrong number": (b"a: !!int x\n", "invalid literal"),
    "an empty number": (b"a: !!int ''\n", "is not YAML of settings"),
    "a wrong bool": (b"a: !!bool x\n", "is not YAML of settings"),
    "a wrong date": (b"a: !!timestamp x\n", "is not YAML of settings"),
    "an object": (b"a: !!python/object/apply:os.system [x]\n", "constructor for the tag"),
    "20,000 digits": (b"seed: " + b"1" * 20_000, "integer string conversion"),
    "two documents": (b"a: 1\n---\na: 2\n", "expected a single document"),
    "a list as a name": (b"? [a]\n: 1\n", "unhashable"),
    "too large": (b"# " + b"x" * 200_000 + b"\nseed: 1\n", "too large for settings"),
    "20,000 names": ("".join(f"k{n}: 1\n" for n in range(20_000)).encode(), "too large"),
    "one name 5,000 times": (b"a: 1\n" * 5_000, "gives 'a' 5000 times"),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_settings_files(tmp_path, case):
    content, reason = WRONG[case]
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(SettingsError, match=r"a\.yaml") as error:
        reader.read_file(tmp_path / "a.yaml")
    assert reason in str(error.value)
    assert len(str(error.value)) < 1_000 and "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_read(tmp_path, encoding):
    (tmp_path / "a.yaml").write_text("query_image: ch\u00e2teau \u57ce\n", encoding=encoding)
    result = reader.read_file(tmp_path / "a.yaml").values
    assert result == {"query_image": "ch\u00e2teau \u57ce"}


def test_thousands_of_unknown_names_are_one_short_message(tmp_path):
    content = "".join(f"top{n:04}: 1\n" for n in range(8_000))
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(SettingsError) as error:
        reader.checked(reader.read_file(tmp_path / "a.yaml"))
    first, *_, last = str(error.value).splitlines()
    assert "a.yaml: there is no setting top0000; did you mean top" in first
    assert last == "and 7990 more faults" and len(str(error.value)) < 10_000


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", 10**400, "seed is <int of 1329 bits>; its numbers must fit into 64 bits"),
        ("query_box", [0, 0, 10**400, 1], "query_box is .* must fit into 64 bits"),
        ("lr", 10**400, "lr: <int of 1329 bits> is int, declared is `float`"),
        ("top", "x" * 10**6, "top: 'xx"),
        ("query_image", ["a"] * 10**5, "query_image: .* is list"),
        ("estimator", "\x1b[2J\u202e", r"unknown estimator '\\x1b\[2J\\u202e'"),
        ("a\x1b[2J\n", 1, r"there is no setting a\\x1b\[2J\\n"),
    ],
)
def test_error_messages_shorten_values(name, value, said):
    with pytest.raises(SettingsError, match=said) as error:
        whole = reader.settings_of(reader.checked(reader.Values.of({name: value}, "mine.yaml")))
        for section in sections.SECTIONS:
            whole.section(section)
    assert len(str(error.value)) < 400 and str(error.value).startswith("mine.yaml: ")


@pytest.mark.parametrize("text", ["1" * 400, "1" * 5_000, "1e400"])
def test_numbers_too_large_are_refused_when_typed(text):
    for name in ("lr", "seed", "query_box"):
        with pytest.raises(SettingsError, match=name) as error:
            typed = reader.checked(reader.from_command_line({name: text}, {}))
            reader.settings_of(typed).section(
                next(kind for kind in sections.SECTIONS if name in kind.flat())
            )
        assert len(str(error.value)) < 400


def test_extending_in_a_chain_is_bounded(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.yaml").write_text(f"extends: [{number + 1}.yaml]\nseed: 1\n")
    (tmp_path / "30.yaml").write_text("seed: 1\n")
    assert reader.read_file(tmp_path / "25.yaml").values == {"seed": 1}
    with pytest.raises(SettingsError, match="too many others: 0.yaml -> 1.yaml"):
        reader.read_file(tmp_path / "0.yaml")
    for name in ("x" * 5_000, "a\0b", "."):
        write(tmp_path, a=f"extends: {json.dumps(name)}\nseed: 1")
        with pytest.raises(FileNotFoundError, match="there is no file"):
            reader.read_file(tmp_path / "a.yaml")


@settings(max_examples=60, derandomize=True)
@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("fuzz") / "a.yaml"
    file.write_bytes(content)
    try:
        reader.read_file(file)
    except (SettingsError, FileNotFoundError):
        pass


def write(folder: Path, **files: str) -> Path:
    """Writes NAME.yaml for each keyword; returns the folder."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_file_that_several_extend_is_read_once(tmp_path):
    # Seven levels; each file extends all five of the next: 19,531 reads without a memory.
    for level in range(7):
        names = [f"{level + 1}-{file}.yaml" for file in range(5)] if level < 6 else []
        for file in range(5):
            text = f"extends: [{', '.join(names)}]\n" if names else ""
            (tmp_path / f"{level}-{file}.yaml").write_text(text + "seed: 5\n")
    reads = []

    def count(frame, event, _):
        if event == "call":
            reads.append(frame.f_code.co_name)

    sys.setprofile(count)
    try:
        values = reader.read_file(tmp_path / "0-0.yaml").values
    finally:
        sys.setprofile(None)
    assert values == {"seed": 5}
    assert reads.count("read_yaml") == 1 + 6 * 5


def test_a_file_overrides_the_extended_one(tmp_path):
    write(
        tmp_path, base="seed: 1\nlr: 0.5\nnotebooks: 01-03\n", top="extends: base.yaml\nseed: 2\n"
    )
    values = reader.read_file(tmp_path / "top.yaml")
    assert values.values == {"seed": 2, "lr": 0.5}  # what notebooks base was made for is its own
    assert values.sources["lr"].endswith("base.yaml")


def test_a_file_that_extends_itself_is_refused(tmp_path):
    write(tmp_path, a="extends: b.yaml\nseed: 1", b="extends: a.yaml\nseed: 1")
    with pytest.raises(SettingsError, match=r"a.yaml -> b.yaml -> a.yaml"):
        reader.read_file(tmp_path / "a.yaml")


def test_an_extended_file_that_is_missing_is_named(tmp_path):
    write(tmp_path, a="extends: gone.yaml\nseed: 1")
    with pytest.raises(FileNotFoundError, match=r"gone.yaml"):
        reader.read_file(tmp_path / "a.yaml")


def test_two_extended_files_that_disagree_need_a_decision(tmp_path):
    write(
        tmp_path, a="seed: 1\nlr: 0.5", b="seed: 2\nlr: 0.5", c="extends: [a.yaml, b.yaml]\ntop: 3"
    )
    with pytest.raises(SettingsError, match=r"seed is 1 in .*a.yaml and 2 in .*b.yaml"):
        reader.read_file(tmp_path / "c.yaml")
    write(tmp_path, c="extends: [a.yaml, b.yaml]\nseed: 3")
    assert reader.read_file(tmp_path / "c.yaml").values == {"seed": 3, "lr": 0.5}


@pytest.mark.parametrize("value", ["3", "[1]", "true"])
def test_extends_names_files(tmp_path, value):
    write(tmp_path, a=f"extends: {value}\nseed: 1")
    with pytest.raises(SettingsError, match="extends"):
        reader.read_file(tmp_path / "a.yaml")


# Layers


def test_recipe_and_machine_lie_below_everything_else():
    chosen = {"recipe": "demo", "machine": "laptop", "lr": 0.25}
    whole = reader.settings_of(reader.checked(reader.Values.of(chosen, "a test")))
    recipe = yaml.safe_load((runs.resolve("params/recipes") / "demo.yaml").read_text())
    assert whole.training.lr == 0.25
    assert whole.training.epochs == recipe["epochs"] != sections.TrainingSettings.epochs
    assert whole.machine.threads == 1
    assert whole.training.label_smoothing == sections.TrainingSettings.label_smoothing


@pytest.mark.parametrize("name", ["nothing", "../demo", "demo.yaml"])
def test_an_unknown_recipe_is_refused(name):
    with pytest.raises(SettingsError, match="recipe .*demo"):
        reader.settings_of(reader.Values.of({"recipe": name}, "a test"))


def test_a_notebook_reads_its_cell_and_injected_values():
    namespace = {
        "max_distance": 0.95, "top": 7, "extends": "published.yaml", "threshold": 3.0,
        "In": [
            "max_distance: float = 0.95\ntop: int = 7",
            "# Parameters\nextends = 'published.yaml'\nthreshold = 3.0",
        ],
        "_i": "x", "read_settings": reader.read_settings, "pd": math,
    }  # fmt: skip
    whole = reader.read_settings(namespace)
    # the extended file beats the cell, what was injected beats the file
    assert whole.reranking.matching.max_distance == 0.82
    assert whole.reranking.verification.threshold == 3.0
    assert whole.reranking.top == 7
    assert whole.sources["threshold"] == "the injected parameters"


def test_a_notebook_with_an_unknown_name_or_a_wrong_type_stops():
    with pytest.raises(SettingsError, match="max_distanze; did you mean max_distance"):
        reader.read_settings({"max_distanze": 0.9})
    with pytest.raises(SettingsError, match="top"):
        reader.read_settings({"top": "many"})


def test_a_value_out_of_range_names_its_source():
    whole = reader.settings_of(reader.Values.of({"threshold": -1.0}, "mine.yaml"))
    with pytest.raises(SettingsError, match="mine.yaml: .*threshold"):
        _ = whole.reranking


def recorded_stage(tmp_path: Path, **parameters: object) -> Path:
    """A finished stage whose manifest holds the parameters."""
    with runs.stage(tmp_path / "stage", "rerank", parameters=parameters, inputs={}) as stage:
        stage.finish([])
    return tmp_path / "stage"


def test_recorded_settings_are_used_and_cannot_be_contradicted(tmp_path):
    folder = recorded_stage(tmp_path, max_distance=0.9, threshold=8.0, top=5)
    kind = sections.RerankingSettings
    whole = reader.settings_of(reader.Values({}, {}))
    used = whole.recorded(folder, kind, "06_rerank")
    assert (used.matching.max_distance, used.verification.threshold, used.top) == (0.9, 8.0, 5)
    same = reader.settings_of(reader.Values.of({"max_distance": 0.9}, "a cell"))
    assert same.recorded(folder, kind, "06_rerank") == used
    other = reader.settings_of(reader.Values.of({"max_distance": 0.5}, "a cell"))
    with pytest.raises(SettingsError, match=r"max_distance is 0.5 \(a cell\).*stage.json.*0.9"):
        other.recorded(folder, kind, "06_rerank")


def test_a_stage_that_is_not_finished_records_nothing(tmp_path):
    whole = reader.settings_of(reader.Values({}, {}))
    with pytest.raises(runs.StageError, match="06_rerank"):
        whole.recorded(tmp_path / "none", sections.RerankingSettings, "06_rerank")


# One object from YAML, a cell and the command line

VALUES = {
    bool: st.booleans(),
    int: st.integers(1, 10**6),
    float: st.floats(1e-3, 0.999),
    str: st.text(string.ascii_lowercase, min_size=1, max_size=8).filter(
        lambda text: text not in ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
    ),
}


@st.composite
def some_settings(draw):
    """Flat values of the reranking and tuning sections, in range."""
    values = {}
    if draw(st.booleans()):
        values["max_distance"] = draw(VALUES[float])
    if draw(st.booleans()):
        values["iterations"] = draw(VALUES[int])
    if draw(st.booleans()):
        values["estimator"] = draw(st.sampled_from(sections.ESTIMATORS))
    if draw(st.booleans()):
        values["tune"] = draw(VALUES[bool])
    if draw(st.booleans()):
        values["tune_distances"] = draw(st.lists(VALUES[float], min_size=1, max_size=4))
    if draw(st.booleans()):
        values["tune_queries"] = draw(st.none() | VALUES[int])
    return values


@settings(max_examples=60, derandomize=True)
@given(some_settings())
def test_yaml_cell_and_command_line_give_the_same_object(tmp_path_factory, values):
    file = tmp_path_factory.mktemp("same") / "a.yaml"
    file.write_text(yaml.safe_dump(values | {"seed": 1}))
    from_yaml = reader.settings_of(reader.checked(reader.read_file(file)))
    from_cell = reader.read_settings(values | {"seed": 1})
    texts = {name: typed_as(value) for name, value in values.items()} | {"seed": "1"}
    from_text = reader.settings_of(reader.checked(reader.from_command_line(texts, {})))
    assert from_yaml.reranking == from_cell.reranking == from_text.reranking
    assert from_yaml.tuning == from_cell.tuning == from_text.tuning


def typed_as(value: object) -> str:
    """A value as somebody types it."""
    if isinstance(value, list):
        return ",".join(map(repr, value))
    return "null" if value is None else str(value) if not isinstance(value, float) else repr(value)


def test_typed_paths_are_relative_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = {"weights": "a/b", "image_folder": "a/b", "run_dir": "a/b", "name": "a/b"}
    assert reader.from_command_line(texts, {"name": str}).values == {
        "weights": str(tmp_path / "a/b"),
        "image_folder": str(tmp_path / "a/b"),
        "run_dir": "a/b",  # a run's name, not a path
        "name": "a/b",
    }
    for text in ("2019: Rome/~a", "untrained:x"):
        result = reader.from_command_line({"image_folder": text}, {}).values["image_folder"]
        assert result == str(tmp_path / text)
    with pytest.raises(SettingsError, match=r"image_folder: caf\\udce9 is no UTF-8: rename it"):
        reader.from_command_line({"image_folder": "caf\udce9"}, {})
    for text, value in {"untrained:xcit": "untrained:xcit", "null": None}.items():
        assert reader.from_command_line({"weights": text}, {}).values == {"weights": value}


# The sections themselves


@pytest.mark.parametrize("section", sections.SECTIONS)
def test_defaults_are_of_their_type_and_in_range(section):
    instance = section()
    for name, entry in section.flat().items():
        value = entry.default
        plain = list(value) if isinstance(value, tuple) else value
        assert conform(name, plain, section.flat()[name].type) == value
    assert dataclasses.is_dataclass(instance)


def test_a_name_shared_by_sections_has_one_default_and_one_type():
    apart = {"top", "epochs"}  # no section may differ but these, which have names of their own
    for name in sections.all_names():
        entries = [kind.flat()[name] for kind in sections.SECTIONS if name in kind.flat()]
        assert len({repr(entry.default) for entry in entries}) == 1 or name in apart, name
        assert len({entry.type for entry in entries}) == 1, name


def test_cells_are_run_again_in_one_kernel():
    """What later cells left is no setting; a changed parameters cell is."""
    cell, setup = "top: int = 5\nseed = 3", "settings = read_settings(globals())"
    first = {"In": ["", cell, setup], "top": 5, "seed": 3}
    assert reader.read_settings(first).values == {"top": 5, "seed": 3}
    history = [*first["In"], "hard = 4\nfor query, name in []: pass", "top: int = 9", setup]
    again = {"In": history, "top": 9, "seed": 3, "hard": 4, "query": 1}
    assert reader.read_settings(again).values == {"top": 9, "seed": 3}
    with pytest.raises(SettingsError, match="hard"):
        reader.read_settings({"In": ["", "hard = 4", setup], "hard": 4})
