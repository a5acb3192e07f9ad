"""The choice of networks for own photographs, and for comparison with a run's model."""

from dataclasses import dataclass
from pathlib import Path

from vitgal import runs
from vitgal.models.sources import INSTALL, TimmSource, baseline_network, rounded_network
from vitgal.settings import GlobalSettings, Settings, Values
from vitgal.stages.own_describer import Describer

BASELINE = "EfficientNet-Lite0"

# What suits the demo's small model, and EfficientNet-Lite0 with RootSIFT; the latter chosen on the
# bundled photographs, not on those of benchmarks/own.py.
SMALL_MODEL_VALUES = {
    "top": 20,
    "global_size": 224,
    "global_scales": (0.5, 0.7071, 1.0),
    "global_resize": "area",
    "local_size": 320,
    "max_distance": 0.95,
    "matching": "mutual",
    "count": "features",
    "order": "fused",
    "fused_weight": 3.0,
}
BASELINE_VALUES = {
    "top": 50,
    "global_size": 288,
    "global_scales": (0.5556, 0.7778, 1.0),  # 160, 224 and 288 pixels
    "global_resize": "area",
    "local": "sift",
    "local_size": 480,
    "max_distance": 1.0,
    "matching": "mutual_ratio",
    "match_ratio": 0.85,
    "estimator": "magsac",
    "threshold": 6.0,
    "confidence": 0.999,
    "count": "inliers",
    "order": "fused",
}


@dataclass(frozen=True)
class OwnModels:
    """The models of global descriptors and of local features, and the reason for the choice."""

    describing: Path | str
    local: Path | str
    reason: str

    def announce(self, run: Path) -> str:
        """Writes the reason to `<run>/own/model.txt`, for `vitgal own`, and returns it."""
        runs.refuse_links([run / "own"])
        runs.write_text(run / "own" / "model.txt", f"{self.reason}\n")
        return self.reason

    def complete(self, settings: Settings) -> Settings:
        """Returns settings in which all that was not set suits the models.

        With EfficientNet-Lite0 these are RootSIFT, its matching and the fused order; with another
        network of timm the size that it was made for, at one scale; else what suits the demo's
        small model.
        """
        values = SMALL_MODEL_VALUES
        if str(self.describing) in {str(baseline_network()), str(rounded_network())}:
            values = BASELINE_VALUES
        elif str(self.describing).startswith(runs.TIMM):
            values = SMALL_MODEL_VALUES | {
                "global_size": None,
                "global_scales": GlobalSettings.scales,
            }
        missing = {name: value for name, value in values.items() if name not in settings.values}
        whole = settings | Values.of(missing, "what suits the model")
        return Settings(whole.values, whole.sources)

    def describer(self, run: Path, settings: Settings) -> Describer:
        """Returns what describes photographs with these models, by settings that suit them."""
        return Describer(
            run,
            self.describing,
            settings.describing,
            settings.local,
            settings.machine,
            local_model=self.local,
        )


def model_name(model: Path | str) -> str:
    """Returns a model's name for a table: of a timm network its own, else "ViTGaL"."""
    source = TimmSource.parse(model)
    return "ViTGaL" if source is None else source.name


def other_models(untrained: str | None, baseline: bool) -> dict[str, str]:
    """Returns the models that a benchmark scores beside the run's own, by name.

    untrained: an architecture, for its random weights. baseline: EfficientNet-Lite0; where its
    package is missing, a line is printed.
    """
    models = {} if untrained is None else {"untrained": f"{runs.UNTRAINED}{untrained}"}
    if baseline:
        if source := baseline_network():
            models[BASELINE] = str(source)
        else:
            print(f"{BASELINE} is left out, since its weights are missing: {INSTALL}")
    return models


def own_models(run: Path, weights: str | None = None) -> OwnModels:
    """Chooses the models for a folder of photographs.

    A model that is set, or the run's own, describes and gives local features. A run without one
    takes EfficientNet-Lite0: of the extra `baselines`, else the weights of 8 bits that come along;
    without either the small weights. A network of timm has no local features of its own: they are
    the run's, else those of the small weights.

    Raises StageError where the run's training is unfinished.
    """
    trained = runs.has_trained(run)
    small = runs.resolve(runs.SMALL_WEIGHTS)
    name = runs.printable(run.name)
    if weights is not None:
        model = runs.resolve_source(weights)
        if not str(model).startswith(runs.TIMM):
            return OwnModels(model, model, f"model: {model}, as set")
        local = runs.model_file(run, None) if trained else small
        return OwnModels(model, local, f"model: {model}, as set; local features: {local.name}")
    baseline = None if trained else baseline_network() or rounded_network()
    if baseline is not None:
        bits = " (8 bits)" if baseline == rounded_network() else ""
        reason = (
            f"model: {BASELINE}{bits}, trained on ImageNet, since {name} has no model of its own; "
            "local features: RootSIFT, unless local is set"
        )
        return OwnModels(str(baseline), small, reason)
    model = runs.model_file(run, None)
    reason = f"model: the one that {name} has trained"
    if not trained:
        reason = (
            f"model: the small {runs.SMALL_WEIGHTS}, since {name} has no model of its own; a "
            f"better one: {INSTALL}"
        )
    return OwnModels(model, model, reason)
