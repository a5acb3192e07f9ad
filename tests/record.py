"""Puts the outputs of a finished demo run into notebooks/: `python -m tests.record [RUN]`.

Sources and ids stay those of notebooks/; only outputs and execution counts are taken, without
papermill's metadata and widget state. Run `make test` afterwards: it compares them. 08 is outside
the chain; from notebooks/, `papermill 08_own_photos.ipynb RUN/notebooks/08_own_photos.ipynb` with
VITGAL_RUNS set executes it with its defaults. A notebook that was not executed is left as it is.
"""

import sys

import nbformat

from vitgal import runs


def main(run_dir: str = "demo") -> None:
    for path in sorted((runs.checkout() / "notebooks").glob("0[1-8]_*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        other = runs.run_folder(run_dir) / "notebooks" / path.name
        if not other.exists():
            print(f"{path.name}: not executed in {run_dir}, left as it is")
            continue
        executed = nbformat.read(other, as_version=4)
        done = [cell for cell in executed.cells if cell.cell_type == "code"]
        actual = [cell for cell in notebook.cells if cell.cell_type == "code"]
        if [cell.source for cell in done] != [cell.source for cell in actual]:
            raise ValueError(f"{path.name} is not what {run_dir} executed: run it again")
        for cell, other in zip(actual, done, strict=True):
            live = "viz.live_curves" in cell.source  # a later cell draws the final curves
            outputs = [output for output in other.outputs if not (live and has_picture(output))]
            kept = [output for output in outputs if not needs_kernel(output)]
            cell.outputs = [without_widget(output) for output in kept]
            cell.execution_count = other.execution_count
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


def needs_kernel(output: nbformat.NotebookNode) -> bool:
    """Whether it is a widget without a picture: its text, 0 % of a bar say, tells nothing."""
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return widget and not has_picture(output)


def has_picture(output: nbformat.NotebookNode) -> bool:
    """Whether an output shows an image."""
    return any(kind.startswith("image/") for kind in output.get("data", {}))


def without_widget(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A widget's view means nothing without its state, which is not kept; its text stays.

    Of the metadata only the shown size of pictures is kept.
    """
    if "data" in output:
        output.data.pop("application/vnd.jupyter.widget-view+json", None)
    for kind in list(output.get("metadata", {})):
        if not kind.startswith("image/"):
            del output.metadata[kind]
    return output


if __name__ == "__main__":
    main(*sys.argv[1:])
