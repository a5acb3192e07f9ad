"""Search, matching, verification and reranking: arrays in, arrays out."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "exact_search": ["rank_images", "search", "similarities"],
        "faiss_index": ["Index", "build", "check", "find", "positions_behind", "read", "recall"],
        "matching": [
            "Descriptors",
            "check_matching_device",
            "match",
            "match_prepared",
            "match_shortlist",
            "match_squares",
            "matching_device",
        ],
        "pairs": ["PairInspection", "inspect_pair", "inspect_shortlist"],
        "exact_ranks": ["labelled_positions"],
        "ranking": ["Positions", "Ranking"],
        "reranking": ["Reranking", "padded", "rerank"],
        "shortlists": [
            "candidates",
            "read_global_rank",
            "read_rerank_paths",
            "read_shortlist",
            "shortlist",
            "shortlist_depth",
            "write_global_rank",
            "write_rerank_paths",
            "write_shortlist",
        ],
        "verification": ["Verification", "verify", "verify_matches"],
    },
)
