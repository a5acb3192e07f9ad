"""Photographs and benchmarks: reading, splitting, downloading, and the bundled demo data."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["demo", "download"],
    submod_attrs={
        "gldv2": [
            "exclude_images",
            "image_path",
            "missing_images",
            "overlap_audit",
            "read_exclusions",
            "read_landmark_table",
        ],
        "images": [
            "ImageError",
            "ReadError",
            "crop_box",
            "is_whole",
            "jpeg_shape",
            "normalise",
            "read_image",
            "resize",
            "resized_shape",
        ],
        "photographs": ["Listing", "PhotographError", "list_photographs", "read_upright"],
        "revisited": [
            "GroundTruth",
            "QueryError",
            "RetrievalDataset",
            "check_ground_truth",
            "check_query",
            "ignored",
            "labelled",
            "load_ground_truth",
            "open_dataset",
            "positives",
            "write_ground_truth",
        ],
        "splits": [
            "class_counts",
            "class_table",
            "order_classes",
            "overlap_report",
            "read_split",
            "read_split_txt",
            "retrieval_validation",
            "sample_images",
            "split_landmarks",
            "split_statistics",
            "validation_ground_truth",
            "write_csv",
            "write_split_txt",
        ],
    },
)
