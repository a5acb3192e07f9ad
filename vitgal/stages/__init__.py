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
        "cluster": ["OnCluster"],
        "demo": ["make_demo"],
        "describe": ["evaluate_global"],
        "descriptors": ["evaluate_descriptors"],
        "extract": ["extract_shortlist", "shortlist_jobs"],
        "images": ["Job", "Loaded", "Results", "Runner", "load", "prefetch", "query_jobs"],
        "inspection": [
            "InspectionError",
            "Inspector",
            "Look",
            "Pair",
            "compare",
            "look",
            "map_near",
            "shared_features",
            "sweep",
            "without_scales",
        ],
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
        "rankings": ["global_outputs", "write_rankings"],
        "rerank": ["hard_candidates", "inlier_counts", "pair_features", "rerank_shortlist"],
        "shards": ["Piece", "shards_of"],
        "split": ["make_split"],
        "train": ["fit_autoencoder", "fit_retrieval", "read_log", "split_inputs"],
        "tune": ["pair_counts", "prepare", "validation_benchmark"],
    },
)
