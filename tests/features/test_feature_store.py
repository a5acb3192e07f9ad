"""The feature store as a mapping: what goes in comes out, and a missing key says why."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from tests.features.examples import ITEMS, assert_same
from vitgal.features import store


def test_round_trip(folder):
    opened = store.FeatureStore.open(folder, verify=True)
    assert opened.names == list(opened) == ["b", "q/b", "ähre/1", "c"]
    assert len(opened) == 4
    assert opened.code_dim == 10
    for key, wanted in ITEMS.items():
        assert_same(opened[key], wanted, 5e-4)  # half precision
    assert opened.failures == {"d": "the file is empty"}


def test_raw(folder):
    raw = store.FeatureStore.open(folder).raw("c")
    np.testing.assert_array_equal(raw["descriptors"], ITEMS["c"].descriptors.astype(np.float16))
    assert not raw["descriptors"].flags.writeable


def test_missing_keys_are_explained(folder):
    opened = store.FeatureStore.open(folder)
    for key, message in (("d", "the file is empty"), ("e", "not in")):
        with pytest.raises(KeyError, match=message):
            opened[key]


def test_pickles_as_its_folder(folder):
    opened = store.FeatureStore.open(folder)
    packed = pickle.dumps(opened)
    assert len(packed) < 500
    assert_same(pickle.loads(packed)["c"], opened["c"], 0)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="05_local_extraction"):
        store.FeatureStore.open(tmp_path)


def test_no_torch_is_imported():
    modules = "vitgal.features.store.feature_store, vitgal.features.selection"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(child.stdout.lower()) is False
