"""environment.yml, constraints.txt and CITATION.cff stay in step with pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

TOP = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def environment() -> dict:
    return yaml.safe_load((TOP / "environment.yml").read_text())


def test_conda_installs_python_and_pip_installs_the_rest(environment):
    *conda, pip = environment["dependencies"]
    # Further versions here would be a second source beside pyproject.toml.
    assert [entry.partition("=")[0] for entry in conda] == ["python", "pip"]
    assert pip == {"pip": ["-e .[baselines,dev,heic,scale]"]}
    assert {"baselines", "dev", "heic", "scale"} == PROJECT["optional-dependencies"].keys()
    assert environment["name"] == PROJECT["name"]


def test_conda_python_is_a_supported_one(environment):
    version = environment["dependencies"][0].partition("=")[2]
    assert version in SpecifierSet(PROJECT["requires-python"])


def test_no_second_channel(environment):
    # The `pytorch` channel stopped at 2.5; `defaults` has terms of its own.
    assert environment["channels"] == ["conda-forge", "nodefaults"]


@pytest.mark.parametrize("minor, fits", [(10, False), (11, True), (12, True), (13, True)])
def test_python_range(minor, fits):
    assert (f"3.{minor}.1" in SpecifierSet(PROJECT["requires-python"])) == fits


def pins() -> dict[str, list[Requirement]]:
    """Returns the lines of constraints.txt by name, of which some depend on the Python version."""
    pinned: dict[str, list[Requirement]] = {}
    for line in (TOP / "constraints.txt").read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text:
            requirement = Requirement(text)
            pinned.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return pinned


def test_constraints_pin_every_dependency_within_its_range():
    pinned = pins()
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)]
    for requirement in map(Requirement, wanted):
        lines = pinned.get(canonicalize_name(requirement.name), [])
        assert lines, f"constraints.txt does not pin {requirement.name}"
        for line in lines:
            exact = re.fullmatch(r"==([\w.+]+)", str(line.specifier))
            assert exact, f"{line} is not one exact version"
            assert exact[1] in requirement.specifier, f"{line} is not within {requirement}"


def test_make_installs_every_extra():
    installed = re.search(r'--editable "\.\[([\w,]+)\]"', (TOP / "Makefile").read_text())[1]
    assert set(installed.split(",")) == PROJECT["optional-dependencies"].keys()


def test_constraints_hold_versions_only():
    text = (TOP / "constraints.txt").read_text()
    assert "://" not in text
    assert "--" not in text
    assert "+cpu" not in text  # a CPU torch beside the index's torchvision breaks `import timm`


def test_citation():
    citation = yaml.safe_load((TOP / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Phan",
        "Nguyen",
        "Warrier",
        "Gupta",
    ]
    assert (paper["start"], paper["end"], paper["year"]) == (2527, 2544, 2022)
    assert paper["title"] == (
        "Patch Embedding as Local Features: Unifying Deep Local and Global Features via "
        "Vision Transformer for Image Retrieval"
    )
