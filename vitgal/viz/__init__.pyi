from .browsers import browse_failures as browse_failures, live_curves as live_curves
from .diagrams import Step as Step, step_diagram as step_diagram
from .failures import failure_figure as failure_figure, failure_table as failure_table
from .figure_folder import FigureFolder as FigureFolder
from .galleries import (
    QueryImage as QueryImage,
    RankedImage as RankedImage,
    before_after as before_after,
    contact_sheet as contact_sheet,
    ranking_rows as ranking_rows,
    stacked_rankings as stacked_rankings,
)
from .maps import (
    attention_heads as attention_heads,
    attention_maps as attention_maps,
    dropped_features as dropped_features,
    reconstruction_error as reconstruction_error,
)
from .match_inspector import (
    Layers as Layers,
    MatchInspector as MatchInspector,
    inspect_matches as inspect_matches,
    inspected_matches as inspected_matches,
)
from .matching import (
    MatchedImage as MatchedImage,
    feature_counts as feature_counts,
    keypoints as keypoints,
    match_lines as match_lines,
)
from .photograph_browser import (
    PhotographBrowser as PhotographBrowser,
    browse_photographs as browse_photographs,
)
from .photographs import (
    pair_figure as pair_figure,
    ranking_figure as ranking_figure,
    reduce_image as reduce_image,
)
from .run_figures import (
    existing_queries as existing_queries,
    global_diagram as global_diagram,
    pair_matches as pair_matches,
    ranking_gallery as ranking_gallery,
    reranked_gallery as reranked_gallery,
    reranking_diagram as reranking_diagram,
    save_pair_matches as save_pair_matches,
)
from .scores import (
    ap_change as ap_change,
    parameter_curves as parameter_curves,
    score_bars as score_bars,
    tuning_curves as tuning_curves,
)
from .style import save_figure as save_figure
from .training import split_statistics as split_statistics, training_curves as training_curves
