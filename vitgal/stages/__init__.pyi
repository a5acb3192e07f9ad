from .benchmark import (
    VALIDATION as VALIDATION,
    image_folder as image_folder,
    local_settings as local_settings,
    model_path as model_path,
    open_benchmark as open_benchmark,
    reranking_settings as reranking_settings,
)
from .demo import make_demo as make_demo
from .describe import evaluate_global as evaluate_global
from .descriptors import evaluate_descriptors as evaluate_descriptors
from .extract import extract_shortlist as extract_shortlist
from .images import ImageTask as ImageTask
from .inspection import (
    ComparedPair as ComparedPair,
    InspectionError as InspectionError,
    Inspector as Inspector,
    compare as compare,
    sweep as sweep,
    without_scales as without_scales,
)
from .local_describer import LocalDescriber as LocalDescriber
from .own import (
    Photographs as Photographs,
    SearchResult as SearchResult,
    describe_folder as describe_folder,
    export_features as export_features,
    export_pairs as export_pairs,
    find_query as find_query,
    retrieval_pairs as retrieval_pairs,
    search_folder as search_folder,
    write_ranking as write_ranking,
)
from .own_descriptions import Describer as Describer, Description as Description
from .ray_describer import RayDescriber as RayDescriber, open_describer as open_describer
from .rerank import (
    hard_candidates as hard_candidates,
    inlier_counts as inlier_counts,
    pair_features as pair_features,
    rerank_shortlist as rerank_shortlist,
)
from .split import make_split as make_split
from .token_selection import (
    REASONS as REASONS,
    TokenSelection as TokenSelection,
    explain_selection as explain_selection,
    matching_fraction as matching_fraction,
)
from .train import (
    fit_autoencoder as fit_autoencoder,
    fit_retrieval as fit_retrieval,
    read_log as read_log,
    split_inputs as split_inputs,
)
from .tuning import pair_counts as pair_counts, tune as tune
from .validation import (
    prepare_validation as prepare_validation,
    validation_benchmark as validation_benchmark,
)
