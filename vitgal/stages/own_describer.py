"""Descriptions of own photographs, kept by content.

Descriptions are stored under the sha256 of the photograph's file, so that a renamed or moved
photograph is not described again:

    <run>/own/files.json                                      the sha256 of known files
    <run>/own/<fingerprint of the settings>/settings.json     what the descriptions depend on
    <run>/own/<fingerprint of the settings>/ab/abcd….npz      one photograph, or a box of it

All coordinates are pixels of the upright photograph, turned by its EXIF orientation.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitgal import runs
from vitgal.data.images import PATCH, crop_box, resize
from vitgal.data.photographs import PhotographError, file_digest, read_oriented
from vitgal.features import store
from vitgal.features.files import read_arrays
from vitgal.features.local import LocalFeatures
from vitgal.features.selection import Frame
from vitgal.models import describers as networks, inference
from vitgal.models.descriptors import describe, local_features, require_codes
from vitgal.models.local_extractors import LocalExtractor, extractor_inputs, make_extractor
from vitgal.models.prepared import prepare
from vitgal.models.sources import sized, weights_fingerprint
from vitgal.settings import (
    GlobalSettings,
    LocalSettings,
    MachineSettings,
    RerankingSettings,
    SelectionSettings,
    SettingsError,
)
from vitgal.stages.known_files import KnownFiles

if TYPE_CHECKING:
    from vitgal.stages.inspection import TokenSelection

# Settings of reranking that do not change the counts of a pair.
UNCOUNTED = ("top", "ties", "order", "fused_weight", "fused_cap")


@dataclass(frozen=True, eq=False)
class Glance:
    """What a folder's ranking needs of a description, without its local features."""

    file: Path  # where the description is stored
    descriptor: np.ndarray  # (D,) float32, of length 1
    image_size: tuple[int, int]  # (h, w) of the upright photograph
    note: str | None  # a remark on its file's end


@dataclass(frozen=True, eq=False)
class Description:
    """The description of one photograph, or of a box in it."""

    file: Path  # where it is stored
    descriptor: np.ndarray  # (D,) float32, the global descriptor, of length 1
    features: LocalFeatures
    orientation: int  # by EXIF, 1 to 8


@dataclass(eq=False)
class Describer:
    """Describes photographs with one model and keeps the descriptions in the run's folder.

    The model is loaded when the first new photograph is described. Each model and each choice of
    settings has its own folder, which is never deleted. The descriptors of local features
    are always stored as float16.

    local_model: of local features that are tokens, a weight file with autoencoder; None: `model`.
    """

    run: Path
    model: Path | str  # as for `open_model`
    global_settings: GlobalSettings = GlobalSettings()
    local_settings: LocalSettings = LocalSettings()
    machine: MachineSettings = MachineSettings()
    extracted: int = 0  # number of descriptions that were computed, not read
    local_model: Path | str | None = None

    @functools.cached_property
    def known_files(self) -> KnownFiles:
        """The files whose content is known without reading them."""
        return KnownFiles(self.run / "own" / "files.json")

    @functools.cached_property
    def describing(self) -> GlobalSettings:
        """The settings of global descriptors, with the network's own size as a number."""
        return sized(self.global_settings, self.model)

    @functools.cached_property
    def parameters(self) -> dict[str, Any]:
        """Everything that a description depends on, in plain values."""
        local, precision = self.local_settings, self.precision(self.global_settings)
        # Later options are added only if they are not the default, so that old folders stay valid.
        if local.local_features is not None:
            raise SettingsError(
                "local_features is for benchmarks; own photographs are described here: set local"
            )
        if not local.own_tokens:
            inputs = extractor_inputs(local).items()
            options = {"local": local.local, "max_keypoints": local.max_keypoints}
            options |= {f"local {name}": part.fingerprint() for name, part in inputs}
        else:
            options = {"scales": local.scales, "max_keypoints": local.max_keypoints}
            for field in fields(SelectionSettings):
                if getattr(local, field.name) != field.default:
                    options[field.name] = getattr(local, field.name)
            if self.precision(local) != precision:
                options["precision"] = self.precision(local)
            if self.local_model not in (None, self.model):
                options["local_weights"] = weights_fingerprint(self.local_model)
        for name in ("multiple", "pooling"):
            if (value := getattr(self.describing, name)) is not None:
                options[f"global_{name}"] = value
        return runs.plain({
            "format": 1,
            "weights": weights_fingerprint(self.model),
            "global_size": self.describing.size,
            "global_resize": self.describing.resize,
            "global_scales": self.describing.scales,
            "local_size": local.size,
            "precision": precision,
            "options": options,
        })  # fmt: skip

    def precision(self, settings: GlobalSettings | LocalSettings) -> str:
        """Returns the precision of the settings on this machine's device, "fp32" or "bf16"."""
        device = inference.pick_device(self.machine.device)
        return inference.resolve_precision(settings.precision, device)

    @functools.cached_property
    def folder(self) -> Path:
        """The folder of the descriptions with these settings."""
        folder = self.run / "own" / runs.fingerprint(self.parameters)[:12]
        runs.refuse_links([folder.parent, folder])
        if not (folder / "settings.json").exists():
            runs.write_json(folder / "settings.json", self.parameters)
        return folder

    @functools.cached_property
    def network(self) -> networks.Describer:
        """The model of global descriptors in memory."""
        device = inference.pick_device(self.machine.device)
        network = inference.open_model(self.model, device, pooling=self.global_settings.pooling)
        return prepare(network, self.describing.precision)

    @functools.cached_property
    def local_network(self) -> networks.Describer:
        """The model of local features in memory; ValueError where it has no autoencoder."""
        network, precision = self.network, self.local_settings.precision
        if self.local_model not in (None, self.model) or precision != self.describing.precision:
            network = inference.open_model(
                self.local_model or self.model, inference.device_of(network)
            )
        require_codes(network)
        return prepare(network, precision)

    @functools.cached_property
    def extractor(self) -> LocalExtractor:
        """What finds local features in place of tokens."""
        return make_extractor(self.local_settings, self.machine.device)

    def glance(self, path: Path) -> Glance | None:
        """Returns the glance of a photograph's stored description, None where there is none.

        An unchanged photograph is not read. Raises PhotographError where it cannot be read.
        """
        digest, note = self.known_files.look(path)
        file = self._file(digest)
        try:
            arrays = read_arrays(file, ("descriptor", "sizes"))
        except (OSError, ValueError):
            return None
        descriptor, sizes = arrays["descriptor"], arrays["sizes"]
        if (sizes.dtype, sizes.shape) != (np.int64, (9,)) or descriptor.dtype != np.float32:
            return None
        return Glance(file, descriptor.ravel(), tuple(sizes[6:8].tolist()), note)

    def _file(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.npz"

    def describe(self, path: Path, box: Sequence[int] | None = None) -> Description:
        """Reads the description of a photograph or of a box in it, and computes a missing one.

        box: (x0, y0, x1, y1) in pixels of the upright photograph. Raises PhotographError where the
        photograph cannot be used, or the box does not fit it.
        """
        digest, _ = self.known_files.look(path)
        name = digest if box is None else "-".join([digest, *(str(int(side)) for side in box)])
        file = self._file(name)
        description = read_description(file)
        if description is None:
            arrays = self._extract(path, box)
            if file_digest(path) != digest:
                raise PhotographError(f"{path.name}: it changed while it was read: run this again")
            runs.write_arrays(file, arrays)
            self.extracted += 1
            description = read_description(file)
        return description

    def selection(self, path: Path, box: Sequence[int] | None = None) -> "TokenSelection":
        """Returns kept and dropped tokens of a photograph, or of a box in it, by one pass.

        box: as for `describe`. Raises PhotographError where the photograph cannot be read, and
        ValueError where its local features are no tokens.
        """
        from vitgal.stages.inspection import explain_selection

        image, _ = read_oriented(path)
        settings = replace(self.local_settings, precision=self.precision(self.local_settings))
        with inference.limited_threads(self.machine.threads):
            return explain_selection(self.local_network, image, box, settings)

    def pair_key(self, settings: RerankingSettings) -> str:
        """Returns a hash of all that the counts of a pair depend on."""
        counting = {k: v for k, v in settings.compared().items() if k not in UNCOUNTED}
        return runs.fingerprint([1, self.parameters, counting])[:16]

    def _extract(self, path: Path, box: Sequence[int] | None) -> dict[str, np.ndarray]:
        """Returns a description's arrays: its descriptor, encoded features and sizes."""
        image, orientation = read_oriented(path)
        try:
            crop, crop_frame = crop_box(image, box)
        except ValueError as error:
            raise PhotographError(f"{path.name}: {error}") from None
        if min(crop.shape[:2]) < PATCH:
            raise PhotographError(
                f"{path.name}: a box of {crop.shape[1]} x {crop.shape[0]} pixels is less "
                f"than one patch of {PATCH} x {PATCH}: draw a larger one"
            )
        with inference.limited_threads(self.machine.threads):
            descriptor, features = self._compute(crop, (crop_frame, image.shape[:2]))
        sizes = np.array([*features.sizes, orientation])
        arrays = store.encode_features(features, "float16")
        return {"descriptor": descriptor} | arrays | {"sizes": sizes}

    def _compute(self, crop: np.ndarray, frame: Frame) -> tuple[np.ndarray, LocalFeatures]:
        """Returns the global descriptor (D,) and the local features of a crop (h, w, 3) uint8."""
        settings, local = self.describing, self.local_settings
        local_network = self.local_network if local.own_tokens else None
        whole = resize(crop, settings.size, settings.resize, settings.multiple)[None]
        with inference.inference(self.network, self.precision(settings)):
            (descriptor,) = describe(self.network, whole, settings.scales)
        whole = resize(crop, local.size, "area", getattr(local_network, "multiple", None))
        if local_network is None:
            return descriptor, self.extractor.extract([whole], [frame])[0]
        whole = inference.network_input(whole[None], inference.device_of(local_network))
        with inference.inference(local_network, self.precision(local)):
            (features,) = local_features(local_network, whole, [frame], local)
        return descriptor, features


def read_description(file: Path) -> Description | None:
    """Reads a stored description; None where it is missing or damaged."""
    try:
        arrays = read_arrays(file, ("descriptor", *store.FEATURE_ARRAYS, "sizes"))
    except (OSError, ValueError):
        return None
    stored = store.ShardFormat("float16", sum(arrays["descriptors"].shape[1:]))
    layout = stored.layout(arrays["scores"].size, 0) | {
        "descriptor": (np.dtype(np.float32), (arrays["descriptor"].size,)),
        "sizes": (np.dtype(np.int64), (9,)),
    }
    if any((array.dtype, array.shape) != layout[name] for name, array in arrays.items()):
        return None
    sizes = arrays["sizes"].tolist()
    features = store.decode_features(arrays, sizes, stored.dtype, stored.code_dim)
    return Description(file, arrays["descriptor"], features, orientation=sizes[8])
