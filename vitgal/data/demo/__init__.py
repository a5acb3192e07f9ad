"""The bundled photographs and the simulated views that make the demo's data."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "benchmark": [
            "benchmark_recipes",
            "ground_truth",
            "jpg_path",
            "label",
            "recipe_table",
            "train_path",
            "training_recipes",
            "write_tables",
        ],
        "drawing": ["Light", "View", "draw_view", "query_box", "visible_fraction"],
        "photographs": ["Photograph", "read_photographs", "split_photographs"],
        "rendering": ["render", "write_views"],
    },
)
