"""Describes the images of a benchmark with any timm network, for the parameter `descriptors`.

    python docs/timm_descriptors.py MODEL FOLDER DATASET OUTPUT.npy [--size 224]

MODEL is a timm name with its weights, such as resnet50.a1_in1k or
vit_small_patch14_dinov2.lvd142m; FOLDER holds jpg/ and gnd_DATASET.pkl. The script writes
OUTPUT.npy (images, dimension) and OUTPUT.txt with the images' names.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from tqdm.auto import tqdm

from vitgal import runs
from vitgal.data import revisited
from vitgal.data.images import crop_box, read_image
from vitgal.models.timm_networks import timm_network


def main(arguments: list[str] | None = None) -> Path:
    """Describes every query, cropped to its box, and every database image; returns OUTPUT.npy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("dataset")
    parser.add_argument("output", type=Path, metavar="OUTPUT.npy")
    parser.add_argument("--size", type=int, default=224, help="side of the square input in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--weights", type=Path, help="a file; default: timm downloads them")
    parser.add_argument("--untrained", action="store_true", help="random weights: to try it out")
    options = parser.parse_args(arguments)
    if options.output.suffix != ".npy":
        parser.error(f"{options.output}: the output is a .npy")
    torch.manual_seed(0)
    model = timm_network(
        options.model,
        (options.size, options.size),
        options.weights,
        pretrained=not options.untrained and options.weights is None,
        num_classes=0,  # the pooled features, not the classifier's output
    )
    data = revisited.open_dataset(options.dataset, options.folder)
    rows = list(describe(model, data, options.size, options.batch))
    runs.write_array(options.output, np.concatenate(rows).astype(np.float32))
    names = [*data.ground_truth.queries, *data.database]
    runs.write_text(options.output.with_suffix(".txt"), "".join(f"{name}\n" for name in names))
    return options.output


def describe(
    model: torch.nn.Module, data: revisited.RetrievalDataset, size: int, batch: int
) -> Iterator[np.ndarray]:
    """Yields descriptors (batch, D) float32: first the queries, then the database, in order."""
    config = timm.data.resolve_model_data_config(model) | {"input_size": (3, size, size)}
    # The whole image, since a centre crop would cut off parts of a query's box.
    config |= {"crop_pct": 1.0, "crop_mode": "squash"}
    transform = timm.data.create_transform(**config, is_training=False)
    boxes = [tuple(map(float, box)) for box in data.ground_truth.boxes]
    boxes += [None] * len(data.database)
    inputs = list(zip([*data.query_paths, *data.database_paths], boxes, strict=True))
    for start in tqdm(range(0, len(inputs), batch), desc="describing", unit="batch"):
        part = inputs[start : start + batch]
        crops = [crop_box(read_image(path), box)[0] for path, box in part]
        images = torch.stack([transform(Image.fromarray(crop)) for crop in crops])
        with torch.inference_mode():
            yield model(images).numpy()


if __name__ == "__main__":
    main()
