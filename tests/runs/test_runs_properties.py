"""Properties of run folders that hold for all values."""

import json
import math

import numpy as np
from hypothesis import given, settings, strategies as st

from vitgal import runs

scalars = (
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=8)
)
values = st.recursive(
    scalars,
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(st.text(max_size=4), children, max_size=4)
        | st.tuples(children, children)
    ),
    max_leaves=12,
)


def as_json(value):
    """Returns what JSON can hold of a value: tuples as lists, no nan, no infinity."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@settings(max_examples=100, derandomize=True, deadline=None)
@given(values)
def test_plain_values_survive_json(value):
    plain = runs.plain(value)
    assert plain == as_json(value)
    assert runs.plain(plain) == plain
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert runs.fingerprint(value) == runs.fingerprint(json.loads(json.dumps(plain)))
    assert runs.differences({"value": plain}, {"value": json.loads(json.dumps(plain))}) == []


@settings(max_examples=20, derandomize=True, deadline=None)
@given(value=values)
def test_written_json_is_read_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    assert runs.read_json(runs.write_json(path, value)) == runs.plain(value)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.floats(width=32) | st.integers(-1000, 1000), max_size=6))
def test_arrays_are_plain_as_their_lists(items):
    array = np.array(items, np.float32)
    assert runs.plain({"a": array}) == runs.plain({"a": array.tolist()})
    assert runs.plain(list(array)) == runs.plain(array)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(count=st.integers(1, 20), total=st.integers(0, 100))
def test_the_items_of_all_workers_are_a_partition(count, total):
    indices = [runs.WorkerSlot(number, count).indices(total) for number in range(count)]
    assert sorted(index for part in indices for index in part) == list(range(total))
    assert max(map(len, indices)) - min(map(len, indices)) <= 1
