"""Figures of splits, training, rankings, matches and scores."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "failure_figure": ["failure"],
        "figure_folder": ["FigureFolder"],
        "figures": [
            "failure_table",
            "global_path",
            "known_queries",
            "pair",
            "rerank_path",
            "reranked",
            "safe_name",
            "save_pairs",
        ],
        "maps": ["attention_heads", "attention_maps", "dropped_features", "reconstruction_error"],
        "matching": [
            "feature_counts",
            "homography_to_pixels",
            "inspection",
            "keypoints",
            "matches",
        ],
        "paths": ["tensor_path"],
        "photograph_browser": ["PhotographBrowser", "browse_photographs"],
        "photographs": ["pair_figure", "ranking_figure", "reduce_image"],
        "rankings": [
            "before_after",
            "contact_sheet",
            "galleries",
            "gallery",
            "relevance",
            "two_rankings",
        ],
        "scores": ["ap_change", "knob_curves", "score_bars", "tuning_curves"],
        "style": ["Image", "keep", "save"],
        "training_curves": ["split_statistics"],
        "tuning": ["draw"],
        "widgets": [
            "MatchInspector",
            "Options",
            "Screen",
            "browse_failures",
            "browse_queries",
            "inspect_matches",
            "live_curves",
        ],
    },
)
