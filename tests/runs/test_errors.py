"""Texts in messages: nothing that steers a terminal, nothing that takes gigabytes."""

import collections
import datetime
import pickle
import types
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings, strategies as st

from vitgal import runs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tower.jpg", "tower.jpg"),
        ("塔 башня ปราสาท 🗼 e\u0301", "塔 башня ปราสาท 🗼 e\u0301"),
        ("می\u200cخواهم \u2764\ufe0f 👩\u200d👧", "می\u200cخواهم \u2764\ufe0f 👩\u200d👧"),
        ("a\u3000b\xa0c", "a\u3000b\xa0c"),
        ("a\x1b[2J\x07b", r"a\x1b[2J\x07b"),
        ("a\nb\r\tc\x85\u2028\u2029", r"a\nb\r\tc\x85\u2028\u2029"),
        ("gpj.\u202etower\u2066", r"gpj.\u202etower\u2066"),
        ("caf\udce9", r"caf\udce9"),
        ("\x00\x7f\x9b\ufeff\U000e0041", r"\x00\x7f\x9b\ufeff\U000e0041"),
        (Path("a\nb"), r"a\nb"),
        (None, "None"),
    ],
)
def test_what_is_printed_is_escaped(text, expected):
    assert runs.printable(text) == expected


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=20))
def test_printable_text_is_one_line_in_utf8(text):
    escaped = runs.printable(text)
    assert escaped.encode() and len(escaped.splitlines()) == 1 if text else escaped == ""
    controls = {c for c in escaped if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert controls <= {"\u200c", "\u200d"}
    assert runs.printable(escaped) == escaped


def test_errors_are_shown_without_escape_sequences():
    error = runs.StageError("no \x1b]0;title\x07 here\nsecond line")
    assert error._render_traceback_() == [r"no \x1b]0;title\x07 here", "second line"]


def nested(kind):
    """Returns a value of 30 levels that each refer to the one below ten times."""
    value = kind([0])
    for _ in range(30):
        value = kind([value] * 10)
    return value


NESTED = {
    "list": nested(list),
    "tuple": nested(tuple),
    "dict": nested(lambda items: dict(enumerate(items))),
    "OrderedDict": nested(lambda items: collections.OrderedDict(enumerate(items))),
    "deque": nested(collections.deque),
    "UserList": nested(collections.UserList),
    "namespace": nested(lambda items: types.SimpleNamespace(items=items)),
    "array": nested(lambda items: np.array([*items, None], object)),
    "yaml": yaml.safe_load(
        "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    ),
    "huge integer": 10**100_000,
    "long text": "x" * 10_000_000,
    "long bytes": b"x" * 10_000_000,
    "itself": (loop := []) or loop.append(loop) or loop,
}


@pytest.mark.parametrize("name", NESTED)
def test_representations_are_short(name):
    assert len(runs.short(NESTED[name])) <= 200


@pytest.mark.parametrize(
    "value",
    [None, True, 1, -2.5, "a", [1, "b"], (1, 2), {"a": [1]}, datetime.date(2020, 1, 2), b"a"],
)
def test_small_values_are_shown_whole(value):
    assert runs.short(value) == repr(value)
    assert runs.short(pickle.loads(pickle.dumps(value))) == repr(value)


def test_representations_hold_no_control_characters():
    assert runs.short("a\x1b[2J\u202e\udce9") == repr("a\x1b[2J\u202e\udce9")
    assert "\x1b" not in runs.short(type("a\x1bb", (), {})())


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "//x", "a/..", "a\0b", None, 3, b"a"],
)
def test_paths_that_lead_out_of_their_folder_are_refused(name):
    with pytest.raises(runs.PathError, match="not the path of a file inside data"):
        runs.inside("data", name)


@pytest.mark.parametrize("name", ["a.jpg", "a/b.jpg", "..a", "a..", "a/...", "2019: Rome", r"..\x"])
def test_paths_inside_their_folder(name):
    assert runs.inside("data", name) == Path("data") / name
