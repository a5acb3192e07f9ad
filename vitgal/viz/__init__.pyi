from .browsers import (
    PhotographBrowser as PhotographBrowser,
    browse_photographs as browse_photographs,
    live_curves as live_curves,
)
from .charts import (
    ap_change as ap_change,
    parameter_curves as parameter_curves,
    score_bars as score_bars,
    split_statistics as split_statistics,
    training_curves as training_curves,
)
from .diagrams import (
    Step as Step,
    global_diagram as global_diagram,
    reranking_diagram as reranking_diagram,
    step_diagram as step_diagram,
)
from .drawing import reduce_image as reduce_image
from .failures import failure_figure as failure_figure, failure_table as failure_table
from .galleries import (
    QueryImage as QueryImage,
    RankedImage as RankedImage,
    before_after as before_after,
    contact_sheet as contact_sheet,
    ranking_rows as ranking_rows,
    stacked_rankings as stacked_rankings,
)
from .instrument import Instrument as Instrument
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
from .report import write_report as write_report
from .run_figures import (
    existing_queries as existing_queries,
    pair_figure as pair_figure,
    pair_matches as pair_matches,
    ranking_figure as ranking_figure,
    ranking_gallery as ranking_gallery,
    reranked_gallery as reranked_gallery,
    save_pair_matches as save_pair_matches,
)
from .style import FigureFolder as FigureFolder, save_figure as save_figure
from .tuning import tuning_figure as tuning_figure
