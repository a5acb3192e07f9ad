"""Models on the Hugging Face hub: saved with a card of the run's scores, loaded by name or folder.

A model there is a folder with `model.safetensors` (weights alone, no code), `config.json` (by which
the hub counts downloads; nothing is read from it) and `README.md`, the card.
"""

import re
import tempfile
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelHubMixin, errors, hf_hub_download

from vitgal import runs
from vitgal.data.revisited import PROTOCOLS
from vitgal.evaluation.scores import SCORES, read_scores

FILE = "model.safetensors"
TAGS = ("image-retrieval", "instance-retrieval", "landmark-retrieval", "vitgal")
STAGES = {"global": "global", "rerank": "reranked"}  # a stage's folder -> its name in the card
RECIPE = ("architecture", "image_size", "epochs", "batch_size", "lr", "augment", "code_dim", "seed")
USE = """\
```python
import vitgal

model = vitgal.ViTGaL.from_pretrained("NAME_OR_FOLDER")
image = vitgal.read_image("photograph.jpg")
descriptor = vitgal.extract_global(model, [image])  # (1, D) float32, L2-normalised
```
"""


class HubError(runs.UserError, ValueError):
    """A model that the hub does not give, or a card that cannot be written."""


class HubModel(ModelHubMixin, library_name="vitgal", tags=list(TAGS)):
    """Adds `from_pretrained`, `save_pretrained` and `push_to_hub` to a model."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Loads a model from a folder, or by its name on the hub; float32, in eval mode.

        options: those of huggingface_hub's `hf_hub_download`, as `revision` or `local_files_only`.
        Raises HubError where the hub does not give it; otherwise as `load_model`.
        """
        from vitgal.models.weights import load_model

        folder = Path(pretrained_model_name_or_path).expanduser()
        if folder.is_dir():
            return load_model(folder / FILE)
        model_id = str(pretrained_model_name_or_path)
        page = f"https://huggingface.co/{model_id}"
        try:
            path = hf_hub_download(model_id, FILE, **options)
        except errors.HFValidationError as error:
            raise HubError(
                f"{runs.short(model_id)} is neither a folder here nor a name on the hub "
                "(OWNER/MODEL)"
            ) from error
        except errors.GatedRepoError as error:
            raise HubError(
                f"{model_id} is given out on conditions: accept them at {page}, then log in with "
                "`hf auth login`"
            ) from error
        except (errors.HfHubHTTPError, OSError) as error:
            raise HubError(
                f"{model_id} is no folder here and the hub does not give its {FILE} "
                f"({_first_line(error)}): check the name at {page}; a private model needs `hf auth "
                "login`, and without a network one fetched before is found with "
                "local_files_only=True"
            ) from error
        return load_model(path)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Saves the model and its card on the hub; returns the commit's address.

        options: those of huggingface_hub's mixin, such as `private`, and `model_card_kwargs`.
        Raises HubError where the hub refuses.
        """
        try:
            return super().push_to_hub(repo_id, **options)
        except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError) as error:
            raise HubError(
                f"the hub does not take {repo_id} ({_first_line(error)}): log in by `hf auth "
                "login` with a token that may write there"
            ) from error

    def _save_pretrained(self, save_directory: Path) -> None:
        from vitgal.models.weights import BUILT_FROM, save_model

        save_model(self, save_directory / FILE)
        configuration = {name: getattr(self, name) for name in BUILT_FROM}
        runs.write_json(save_directory / "config.json", runs.plain(configuration))

    def generate_model_card(
        self, run: str | Path | None = None, licence: str | None = None
    ) -> ModelCard:
        """Writes the model's card: data, recipe, scores with intervals, licence, how to use it.

        These are the `model_card_kwargs` of `save_pretrained` and `push_to_hub`, which keep a card
        that is already in the folder.

        Args:
            run: the run that trained and scored the model; None leaves its parts out.
            licence: of the weights, by the hub's short name such as "mit" or "cc-by-4.0".
        Raises:
            HubError: the run has no scores of this model, or the licence is no short name.
        """
        if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
            raise HubError(f"licence {runs.short(licence)} is no short name such as mit")
        front = ["library_name: vitgal", "pipeline_tag: image-feature-extraction", "tags:"]
        front += [f"- {tag}" for tag in TAGS]
        front += [] if licence is None else [f"license: {licence}"]
        text = ["---", *front, "---", "# ViTGaL: landmark image retrieval", ""]
        text += [
            f"A {self.architecture} that gives a global descriptor of {self.embed_dim} numbers"
            + (f" and local features of {self.code_dim}." if self.code_dim else "."),
            "Method: Phan, Nguyen, Warrier, Gupta, ACCV 2022; an independent implementation.",
        ]
        if run is not None:
            folder = runs.run_folder(run) if not Path(run).is_dir() else Path(run)
            text += ["", "## Scores", "", *self._score_lines(folder), *_recipe_lines(folder)]
        stated = licence or "none stated by the weights' author"
        text += ["", "## Licence", "", f"Of the weights: {stated}. Of the code: MIT."]
        return ModelCard("\n".join([*text, "", "## Use", "", USE]))

    def _score_lines(self, run: Path) -> list[str]:
        """Returns a table of the run's scores that this model's weights got, exactly."""
        from vitgal.models.weights import save_model

        with tempfile.TemporaryDirectory() as folder:
            own = runs.fingerprint_file(save_model(self, Path(folder) / FILE))
        rows, seen = [], 0
        for path in sorted(run.glob(f"*/*/{SCORES}")):
            if path.parent.name not in STAGES:
                continue
            scores, seen = read_scores(path.parent), seen + 1
            if scores.get("fingerprints", {}).get("weights") != own:
                continue
            benchmark = re.sub(r"[^\w.+ -]", "_", path.parent.parent.name)
            for protocol in (name for name in PROTOCOLS if name in scores):
                low, high = scores[protocol].get("interval") or (None, None)
                if scores[protocol]["map"] is not None:
                    cells = [benchmark, STAGES[path.parent.name], protocol]
                    cells += [_percent(scores[protocol]["map"])]
                    cells += [f"{_percent(low)} to {_percent(high)}" if low is not None else "–"]
                    rows.append(f"| {' | '.join(cells)} |")
        if not rows:
            problem = "scores of other weights only" if seen else "no scores"
            raise HubError(f"{run} has {problem}: run notebook 04_global_evaluation on this model")
        head = "| benchmark | ranking | protocol | mAP, % | 95 % interval |"
        return [head, "|---" * 5 + "|", *rows]


def _first_line(error: Exception) -> str:
    return runs.printable(str(error).strip().split("\n")[0])[:80]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _recipe_lines(run: Path) -> list[str]:
    """Returns the data and the recipe of each training stage that the run finished."""
    lines = []
    for stage in ("retrieval", "autoencoder"):
        if not (run / stage / runs.MANIFEST).is_file():
            continue
        record = runs.read_stage(run / stage, "notebook 02_train")
        chosen = {n: record["parameters"][n] for n in RECIPE if n in record["parameters"]}
        values = ", ".join(f"{name} {runs.printable(str(v))}" for name, v in chosen.items())
        lines += [f"- {stage}: `{values}`; training images `{record['inputs']['train'][:12]}`"]
    return ["", "## Data and recipe", "", *lines] if lines else []
