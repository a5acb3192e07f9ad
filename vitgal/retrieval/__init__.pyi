from .copies import (
    Comparison as Comparison,
    View as View,
    compare_views as compare_views,
    copy_candidates as copy_candidates,
    group_pairs as group_pairs,
)
from .evidence import Evidence as Evidence, weigh as weigh
from .exact_ranks import labelled_positions as labelled_positions
from .exact_search import (
    WhitenedRows as WhitenedRows,
    rank_images as rank_images,
    search as search,
    similarities as similarities,
)
from .matching import (
    Descriptors as Descriptors,
    match as match,
    match_prepared as match_prepared,
    match_squares as match_squares,
    matching_device as matching_device,
)
from .places import Place as Place, group_places as group_places
from .presence import (
    Presence as Presence,
    PresenceError as PresenceError,
    fit_presence as fit_presence,
)
from .ranking import (
    Fusion as Fusion,
    Positions as Positions,
    Ranking as Ranking,
    Reranking as Reranking,
    fused_scores as fused_scores,
    rerank as rerank,
)
from .refine import (
    RefinementError as RefinementError,
    WhiteningMap as WhiteningMap,
    augmented_blocks as augmented_blocks,
    exact_neighbours as exact_neighbours,
    expand_queries as expand_queries,
    learned_whitening as learned_whitening,
    matching_pairs as matching_pairs,
    neighbour_graph as neighbour_graph,
    pca_whitening as pca_whitening,
    whitened_norms as whitened_norms,
)
from .reorder import (
    ScoredRanking as ScoredRanking,
    diffusion as diffusion,
    k_reciprocal as k_reciprocal,
    superglobal as superglobal,
)
from .shortlists import (
    candidates as candidates,
    read_global_rank as read_global_rank,
    read_rerank_paths as read_rerank_paths,
    read_shortlist as read_shortlist,
    shortlist as shortlist,
    shortlist_depth as shortlist_depth,
    write_global_rank as write_global_rank,
    write_rerank_paths as write_rerank_paths,
    write_shortlist as write_shortlist,
)
from .verification import (
    PairInspection as PairInspection,
    Verification as Verification,
    inspect_pair as inspect_pair,
    inspect_shortlist as inspect_shortlist,
    verify as verify,
    verify_matches as verify_matches,
)
