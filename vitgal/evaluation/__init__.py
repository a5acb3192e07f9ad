"""Scores of rankings: the Revisited protocol, statistics, comparison and tuning."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "comparison": [
            "Comparison",
            "ResultError",
            "compare",
            "compare_folders",
            "compare_results",
            "find_results",
            "report",
            "setting_table",
        ],
        "protocol": ["average_precision", "evaluate", "precision_at"],
        "scores": ["hardest", "intervals", "score_table", "scores_document"],
        "statistics": ["PairedTest", "bootstrap_interval", "paired_test", "verdict"],
        "tuning": ["Tuning", "TuningError"],
    },
)
