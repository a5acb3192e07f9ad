from . import (
    app as app,
    data as data,
    engines as engines,
    evaluation as evaluation,
    features as features,
    models as models,
    retrieval as retrieval,
    runs as runs,
    settings as settings,
    stages as stages,
    training as training,
    viz as viz,
)
from .data.images import ImageError as ImageError, crop_box as crop_box, read_image as read_image
from .data.revisited import (
    GroundTruth as GroundTruth,
    RetrievalDataset as RetrievalDataset,
    load_ground_truth as load_ground_truth,
    open_dataset as open_dataset,
)
from .evaluation.protocol import evaluate as evaluate
from .features.local import LocalFeatures as LocalFeatures
from .features.store.feature_store import FeatureStore as FeatureStore
from .models.descriptors import extract_global as extract_global, extract_local as extract_local
from .models.heads import ArcFace as ArcFace
from .models.network import (
    TokenFeatures as TokenFeatures,
    ViTGaL as ViTGaL,
    build_model as build_model,
)
from .models.weights import (
    initial_weights as initial_weights,
    load_model as load_model,
    save_model as save_model,
)
from .retrieval.exact_search import search as search
from .retrieval.matching import match as match
from .retrieval.ranking import Positions as Positions, rerank as rerank
from .retrieval.verification import Verification as Verification, verify as verify
from .runs.errors import StageError as StageError
