"""Figures of splits, training, rankings, matches and scores, and widgets to browse them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "browsers": ["browse_failures", "live_curves"],
        "diagrams": ["Step", "step_diagram"],
        "failures": ["failure_figure", "failure_table"],
        "figure_folder": ["FigureFolder"],
        "galleries": [
            "QueryImage",
            "RankedImage",
            "before_after",
            "contact_sheet",
            "ranking_rows",
            "stacked_rankings",
        ],
        "maps": ["attention_heads", "attention_maps", "dropped_features", "reconstruction_error"],
        "match_inspector": ["Layers", "MatchInspector", "inspect_matches", "inspected_matches"],
        "matching": [
            "MatchedImage",
            "feature_counts",
            "keypoints",
            "match_lines",
        ],
        "photograph_browser": ["PhotographBrowser", "browse_photographs"],
        "photographs": ["pair_figure", "ranking_figure", "reduce_image"],
        "run_figures": [
            "existing_queries",
            "global_diagram",
            "pair_matches",
            "ranking_gallery",
            "reranking_diagram",
            "reranked_gallery",
            "save_pair_matches",
        ],
        "scores": ["ap_change", "parameter_curves", "score_bars", "tuning_curves"],
        "style": ["save_figure"],
        "training": ["split_statistics", "training_curves"],
    },
)
