"""Global descriptors and local features of one's own photographs, stored on disk.

They are stored under the sha256 of the photograph's file, so that a renamed or moved photograph is
not described again.

    <run>/own/<fingerprint of the settings>/settings.json    what the descriptions depend on
    <run>/own/<fingerprint of the settings>/ab/abcd….npz      one photograph, or a box of it

All coordinates are pixels of the upright photograph, turned by its EXIF orientation.
"""

import dataclasses
import functools
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitgal import runs
from vitgal.data.images import PATCH, crop_box, resize
from vitgal.data.photographs import PhotographError, exif_orientation, file_digest, read_upright
from vitgal.features import store
from vitgal.features.local import LocalFeatures
from vitgal.features.selection import Frame
from vitgal.models import inference
from vitgal.models.descriptors import describe
from vitgal.models.local_features import local_features, require_codes
from vitgal.models.network import ViTGaL
from vitgal.settings import GlobalSettings, LocalSettings, MachineSettings, SelectionSettings


@dataclass(frozen=True, eq=False)
class Description:
    """What a search needs of one photograph, or of a box in it.

    Attributes:
        digest: sha256 of the photograph's file, in hex.
        descriptor: (D,) float32, the global descriptor, of length 1.
        features: the local features.
        orientation: EXIF orientation of the file, 1 to 8.
    """

    digest: str
    descriptor: np.ndarray
    features: LocalFeatures
    orientation: int


@dataclass(eq=False)
class Describer:
    """Describes photographs with one model and keeps the descriptions in the run's folder.

    The model is loaded when the first new photograph is described. Each model and each choice of
    settings has a folder of its own, and none is ever deleted.

    Attributes:
        run: the run's folder.
        model: a weight file with autoencoder, or "untrained:<architecture>".
        global_settings: size, resize, scales and precision of the global descriptor.
        local_settings: size, precision and selection of the local features. Their descriptors are
            always stored as float16.
        machine: device and threads of the network; where matching runs.
        extracted: number of descriptions that were computed, not read.
    """

    run: Path
    model: Path | str
    global_settings: GlobalSettings = GlobalSettings()
    local_settings: LocalSettings = LocalSettings()
    machine: MachineSettings = MachineSettings()
    extracted: int = 0

    @functools.cached_property
    def parameters(self) -> dict[str, Any]:
        """Everything that a description depends on, in plain values."""
        return runs.plain({
            "format": 1,
            "weights": inference.weights_fingerprint(self.model),
            "global_size": self.global_settings.size,
            "global_resize": self.global_settings.resize,
            "global_scales": self.global_settings.scales,
            "local_size": self.local_settings.size,
            "precision": self._precision(self.global_settings),
            "options": self._local_options(),
        })  # fmt: skip

    def _local_options(self) -> dict[str, Any]:
        """Scales, limit, and options that are no default: so old folders stay valid."""
        local = self.local_settings
        options = {"scales": local.scales, "max_keypoints": local.max_keypoints}
        for field in dataclasses.fields(SelectionSettings):
            if getattr(local, field.name) != field.default:
                options[field.name] = getattr(local, field.name)
        if self._precision(local) != self._precision(self.global_settings):
            options["precision"] = self._precision(local)
        return options

    def _precision(self, settings: GlobalSettings | LocalSettings) -> str:
        device = inference.pick_device(self.machine.device)
        return inference.resolve_precision(settings.precision, device)

    @functools.cached_property
    def folder(self) -> Path:
        """The folder of the descriptions with these settings."""
        folder = self.run / "own" / runs.fingerprint(self.parameters)[:12]
        if not (folder / "settings.json").exists():
            runs.write_json(folder / "settings.json", self.parameters)
        return folder

    @functools.cached_property
    def network(self) -> ViTGaL:
        """The model in memory; ValueError where it has no autoencoder."""
        device = inference.pick_device(self.machine.device)
        network = inference.open_model(self.model, device)
        require_codes(network)
        return network

    def describe(self, path: Path, box: Sequence[int] | None = None) -> Description:
        """Reads the description of a photograph or of a box in it, and computes a missing one.

        Args:
            path: the photograph's file.
            box: (x0, y0, x1, y1) in pixels of the upright photograph; None: all of it.
        Raises:
            PhotographError: the photograph cannot be used, or the box does not fit it.
        """
        digest = file_digest(path)
        name = digest if box is None else "-".join([digest, *(str(int(side)) for side in box)])
        file = self.folder / digest[:2] / f"{name}.npz"
        description = _read(file, digest)
        if description is None:
            self._extract(path, box, file)
            self.extracted += 1
            description = _read(file, digest)
        return description

    def _extract(self, path: Path, box: Sequence[int] | None, file: Path) -> None:
        image = read_upright(path)
        try:
            crop, crop_frame = crop_box(image, box)
        except ValueError as error:
            raise PhotographError(f"{Path(path).name}: {error}") from None
        if min(crop.shape[:2]) < PATCH:
            raise PhotographError(
                f"{Path(path).name}: a box of {crop.shape[1]} x {crop.shape[0]} pixels is less "
                f"than one patch of {PATCH} x {PATCH}: draw a larger one"
            )
        with inference.limited_threads(self.machine.threads):
            descriptor, features = self._compute(crop, (crop_frame, image.shape[:2]))
        arrays = {"descriptor": descriptor} | store.encode_features(features, "float16")
        sizes = np.array([*features.sizes, exif_orientation(path)])
        runs.write_arrays(file, **arrays, sizes=sizes)

    def _compute(self, crop: np.ndarray, frame: Frame) -> tuple[np.ndarray, LocalFeatures]:
        """Returns the global descriptor (D,) and the local features of a crop (h, w, 3) uint8."""
        network, settings, local = self.network, self.global_settings, self.local_settings
        device = inference.device_of(network)
        whole = resize(crop, settings.size, settings.resize)[None]
        with inference.inference(network, self._precision(settings)):
            (descriptor,) = describe(network, whole, settings.scales)
        whole = inference.network_input(resize(crop, local.size, "area")[None], device)
        with inference.inference(network, self._precision(local)):
            (features,) = local_features(network, whole, [frame], local)
        return descriptor, features


def _read(file: Path, digest: str) -> Description | None:
    """Reads a stored description; None where it is missing or damaged."""
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (FileNotFoundError, zipfile.BadZipFile, EOFError, ValueError):
        return None
    sizes = [int(value) for value in arrays["sizes"]]
    code_dim = arrays["descriptors"].shape[1]
    features = store.decode_features(arrays, sizes, "float16", code_dim)
    return Description(digest, arrays["descriptor"], features, orientation=sizes[8])
