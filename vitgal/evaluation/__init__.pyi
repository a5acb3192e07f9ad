from .comparison import (
    Comparison as Comparison,
    ResultError as ResultError,
    check_comparable as check_comparable,
    compare as compare,
    compare_folders as compare_folders,
    compare_results as compare_results,
    distinct_names as distinct_names,
    find_results as find_results,
    report as report,
)
from .landmarks import Landmarks as Landmarks, find_landmarks as find_landmarks
from .protocol import (
    average_precision as average_precision,
    evaluate as evaluate,
    mean_precision as mean_precision,
    mean_recall as mean_recall,
    positive_ranks as positive_ranks,
    precision_at as precision_at,
)
from .scores import (
    hardest as hardest,
    intervals as intervals,
    resampled as resampled,
    score_table as score_table,
    scores_document as scores_document,
)
from .statistics import (
    PairedTest as PairedTest,
    bootstrap_interval as bootstrap_interval,
    holm as holm,
    paired_test as paired_test,
    verdict as verdict,
)
from .system_text import (
    as_latex as as_latex,
    as_markdown as as_markdown,
    as_text as as_text,
    display_table as display_table,
    write_table as write_table,
)
from .systems import (
    SystemTable as SystemTable,
    TableError as TableError,
    published_results as published_results,
    system_table as system_table,
)
from .tuning import Tuning as Tuning, TuningError as TuningError
