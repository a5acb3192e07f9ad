from . import demo as demo, download as download
from .formats import image_format as image_format, jpeg_shape as jpeg_shape
from .gldv2 import (
    check_images as check_images,
    check_table_size as check_table_size,
    exclude_images as exclude_images,
    image_path as image_path,
    missing_images as missing_images,
    overlap_audit as overlap_audit,
    read_exclusions as read_exclusions,
    read_landmark_table as read_landmark_table,
    read_overlap as read_overlap,
)
from .images import (
    ImageError as ImageError,
    ReadError as ReadError,
    crop_box as crop_box,
    read_image as read_image,
    resize as resize,
    resized_shape as resized_shape,
)
from .photographs import (
    Listing as Listing,
    PhotographError as PhotographError,
    list_photographs as list_photographs,
    read_upright as read_upright,
)
from .revisited import (
    GroundTruth as GroundTruth,
    QueryError as QueryError,
    RetrievalDataset as RetrievalDataset,
    check_ground_truth as check_ground_truth,
    check_query as check_query,
    ignored as ignored,
    labelled as labelled,
    load_ground_truth as load_ground_truth,
    open_dataset as open_dataset,
    positives as positives,
    write_ground_truth as write_ground_truth,
)
from .splits import (
    LandmarkSplit as LandmarkSplit,
    class_counts as class_counts,
    class_table as class_table,
    order_classes as order_classes,
    overlap_report as overlap_report,
    read_split as read_split,
    read_split_txt as read_split_txt,
    retrieval_validation as retrieval_validation,
    sample_images as sample_images,
    split_landmarks as split_landmarks,
    split_statistics as split_statistics,
    validation_ground_truth as validation_ground_truth,
    write_split_txt as write_split_txt,
)
