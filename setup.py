"""What pyproject.toml cannot say: a wheel holds the checkout's notebooks, params and weights."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("notebooks", "params", "weights", "third_party")  # vitgal.runs.PARTS


class BuildWithProject(build_py):
    """Copies them to vitgal/project/ of a wheel; an editable install uses the checkout's own."""

    def run(self) -> None:
        """Builds the package, then copies the folders."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "vitgal", "project")
        shutil.rmtree(target, ignore_errors=True)  # an earlier build's
        for folder in FOLDERS:
            shutil.copytree(folder, target / folder, ignore=shutil.ignore_patterns(".*"))


setup(cmdclass={"build_py": BuildWithProject})
