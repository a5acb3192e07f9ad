from .comparison import (
    Comparison as Comparison,
    ResultError as ResultError,
    compare as compare,
    compare_folders as compare_folders,
    compare_results as compare_results,
    find_results as find_results,
    report as report,
)
from .protocol import (
    average_precision as average_precision,
    evaluate as evaluate,
    precision_at as precision_at,
)
from .scores import (
    hardest as hardest,
    intervals as intervals,
    score_table as score_table,
    scores_document as scores_document,
)
from .statistics import (
    PairedTest as PairedTest,
    bootstrap_interval as bootstrap_interval,
    paired_test as paired_test,
    verdict as verdict,
)
from .tuning import Tuning as Tuning, TuningError as TuningError
