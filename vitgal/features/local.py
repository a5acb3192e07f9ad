"""LocalFeatures: the keypoints and descriptors of one image."""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, eq=False)
class LocalFeatures:
    """The local features of one image, best first; there may be none.

    Attributes:
        keypoints: (N, 2) float32, (x, y) in pixels of the network input: the image's top-left
            corner is (0, 0), the first patch's centre (8, 8). Matching and verification use these.
        descriptors: (N, C) float32, each of length 1.
        scores: (N,) float32, falling; nan where unknown.
        scales: (N,) float32, the nominal scale of each feature; nan where unknown.
        input_size: (h, w) of the network input in pixels.
        box: (x0, y0, x1, y1) in pixels of the photograph: the crop that was described.
        image_size: (h, w) of the photograph in pixels.

    Raises ValueError where the arrays' shapes do not fit together.
    """

    keypoints: np.ndarray
    descriptors: np.ndarray
    scores: np.ndarray
    scales: np.ndarray
    input_size: tuple[int, int]
    box: tuple[int, int, int, int]
    image_size: tuple[int, int]

    def __post_init__(self) -> None:
        count = len(self.keypoints)
        expected = [(count, 2), (count, *self.descriptors.shape[1:2]), (count,), (count,)]
        arrays = self.keypoints, self.descriptors, self.scores, self.scales
        if self.descriptors.ndim != 2 or [array.shape for array in arrays] != expected:
            raise ValueError(
                "local features do not fit together: keypoints, descriptors, scores and scales "
                f"have the shapes {', '.join(str(array.shape) for array in arrays)}"
            )

    def __len__(self) -> int:
        return len(self.keypoints)

    @property
    def code_dim(self) -> int:
        """Dimension C of the descriptors."""
        return self.descriptors.shape[1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Input size, box and image size as eight integers, as they are stored."""
        return *self.input_size, *self.box, *self.image_size

    def subset(self, index: np.ndarray) -> "LocalFeatures":
        """Returns the features that an index selects: (n,) integers, an (N,) mask or a slice."""
        return replace(
            self,
            keypoints=self.keypoints[index],
            descriptors=self.descriptors[index],
            scores=self.scores[index],
            scales=self.scales[index],
        )

    def original_keypoints(self) -> np.ndarray:
        """Returns the keypoints (N, 2) as `to_photograph` does."""
        return self.to_photograph(self.keypoints)

    def to_photograph(self, points: np.ndarray) -> np.ndarray:
        """Returns points (N, 2) of the network's input as float32 pixels of the stored photograph.

        (0, 0) is the centre of the photograph's top-left pixel, as matplotlib draws. Raises
        ValueError where box and sizes are unknown (all zero), as after a plain import of
        published files.
        """
        x0, y0, x1, y1 = self.box
        if not (x1 > x0 and y1 > y0 and min(self.input_size) > 0):
            raise ValueError(
                "the features have no position on the photograph, since their box and sizes were "
                "not stored: extract them again"
            )
        factor = np.array([x1 - x0, y1 - y0], np.float64) / np.array(self.input_size[::-1])
        return (points * factor + (x0, y0) - 0.5).astype(np.float32)
