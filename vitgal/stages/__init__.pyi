from .audit import (
    Audit as Audit,
    find_copies as find_copies,
    write_audit as write_audit,
)
from .benchmark import (
    VALIDATION as VALIDATION,
    image_folder as image_folder,
    local_settings as local_settings,
    model_path as model_path,
    open_benchmark as open_benchmark,
    prepare_validation as prepare_validation,
    refine_set as refine_set,
    reranking_settings as reranking_settings,
    suited as suited,
    untunable as untunable,
    validation_benchmark as validation_benchmark,
)
from .demo import make_demo as make_demo
from .describe import (
    evaluate_descriptors as evaluate_descriptors,
    evaluate_global as evaluate_global,
)
from .extract import extract_shortlist as extract_shortlist
from .images import ImageTask as ImageTask
from .inspection import (
    REASONS as REASONS,
    ComparedPair as ComparedPair,
    InspectionError as InspectionError,
    Inspector as Inspector,
    TokenSelection as TokenSelection,
    compare as compare,
    explain_selection as explain_selection,
    matching_fraction as matching_fraction,
    query_flow as query_flow,
    similar_patches as similar_patches,
    sweep as sweep,
    without_scales as without_scales,
)
from .local_describer import LocalDescriber as LocalDescriber
from .model_choice import (
    OwnModels as OwnModels,
    model_name as model_name,
    other_models as other_models,
    own_models as own_models,
)
from .own import (
    Photographs as Photographs,
    SearchResult as SearchResult,
    describe_folder as describe_folder,
    find_query as find_query,
    search_folder as search_folder,
    write_ranking as write_ranking,
)
from .own_answers import (
    Answers as Answers,
    NamedQuery as NamedQuery,
    answer as answer,
    find_places as find_places,
    named_queries as named_queries,
    write_answers as write_answers,
    write_places as write_places,
)
from .own_describer import Describer as Describer, Description as Description
from .own_export import (
    export_features as export_features,
    export_pairs as export_pairs,
    export_photographs as export_photographs,
    retrieval_pairs as retrieval_pairs,
    verified_matches as verified_matches,
)
from .presence import (
    fit_places as fit_places,
    judge_benchmark as judge_benchmark,
    known_presence as known_presence,
    presence_key as presence_key,
)
from .rank import try_refinement as try_refinement
from .ray_describer import RayDescriber as RayDescriber, open_describer as open_describer
from .rerank import (
    hard_candidates as hard_candidates,
    inlier_counts as inlier_counts,
    presence_probabilities as presence_probabilities,
    rerank_shortlist as rerank_shortlist,
)
from .split import make_split as make_split
from .train import (
    fit_autoencoder as fit_autoencoder,
    fit_retrieval as fit_retrieval,
    read_log as read_log,
    split_inputs as split_inputs,
)
from .tuning import pair_counts as pair_counts, tune as tune, tuned_pairs as tuned_pairs
from .whitening import RefineSet as RefineSet, open_refine_set as open_refine_set
