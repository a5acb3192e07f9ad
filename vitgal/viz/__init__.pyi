from .charts import (
    live_curves as live_curves,
    parameter_curves as parameter_curves,
    split_statistics as split_statistics,
    training_curves as training_curves,
)
from .diagrams import (
    flow_figure as flow_figure,
    global_diagram as global_diagram,
    reranking_diagram as reranking_diagram,
    step_diagram as step_diagram,
)
from .drawing import reduce_image as reduce_image
from .evidence_figures import (
    attention_and_inliers as attention_and_inliers,
    inlier_rate_by_score as inlier_rate_by_score,
    match_figure as match_figure,
)
from .failures import failure_figure as failure_figure, failure_table as failure_table
from .galleries import (
    QueryImage as QueryImage,
    RankedImage as RankedImage,
    contact_sheet as contact_sheet,
    ranking_rows as ranking_rows,
    stacked_rankings as stacked_rankings,
)
from .instrument import Instrument as Instrument, InstrumentWidget as InstrumentWidget
from .maps import (
    attention_heads as attention_heads,
    attention_maps as attention_maps,
    dropped_features as dropped_features,
    token_figure as token_figure,
)
from .matching import (
    MatchedImage as MatchedImage,
    feature_counts as feature_counts,
    keypoints as keypoints,
    match_lines as match_lines,
)
from .own_document import own_document as own_document
from .photograph_instrument import PhotographInstrument as PhotographInstrument
from .report import (
    write_audit_page as write_audit_page,
    write_page as write_page,
    write_report as write_report,
)
from .run_figures import (
    existing_queries as existing_queries,
    pair_figure as pair_figure,
    pair_matches as pair_matches,
    ranking_figure as ranking_figure,
    ranking_gallery as ranking_gallery,
    reranked_gallery as reranked_gallery,
    retrieval_figure as retrieval_figure,
    save_pair_matches as save_pair_matches,
)
from .scores import (
    ap_change as ap_change,
    retrieval_curves as retrieval_curves,
    score_dots as score_dots,
)
from .style import (
    FigureFolder as FigureFolder,
    save_figure as save_figure,
    sharpen_figures as sharpen_figures,
    stored_picture as stored_picture,
)
from .tuning import tuning_figure as tuning_figure
