"""The stages of a run: each opens its inputs, calls the pure core and writes its folder."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "benchmark": [
            "VALIDATION",
            "image_folder",
            "local_settings",
            "model_path",
            "open_benchmark",
            "reranking_settings",
        ],
        "demo": ["make_demo"],
        "describe": ["evaluate_global"],
        "descriptors": ["evaluate_descriptors"],
        "extract": ["extract_shortlist", "shortlist_tasks"],
        "images": ["ImageTask", "LoadedImage", "load_image", "prefetch", "query_tasks"],
        "inspection": [
            "ComparedPair",
            "InspectionError",
            "Inspector",
            "compare",
            "sweep",
            "without_scales",
        ],
        "local_describer": ["LocalDescriber"],
        "own": [
            "Photographs",
            "SearchResult",
            "describe_folder",
            "export_features",
            "export_pairs",
            "find_query",
            "retrieval_pairs",
            "search_folder",
            "write_ranking",
        ],
        "own_descriptions": ["Describer", "Description"],
        "ray_describer": ["RayDescriber", "open_describer"],
        "rankings": ["global_outputs", "write_rankings"],
        "rerank": ["hard_candidates", "inlier_counts", "pair_features", "rerank_shortlist"],
        "shards": ["ShardTask", "shard_tasks"],
        "split": ["make_split"],
        "token_selection": [
            "REASONS",
            "TokenSelection",
            "explain_selection",
            "matching_fraction",
        ],
        "train": ["fit_autoencoder", "fit_retrieval", "read_log", "split_inputs"],
        "tuning": ["pair_counts", "tune"],
        "validation": ["prepare_validation", "validation_benchmark"],
    },
)
