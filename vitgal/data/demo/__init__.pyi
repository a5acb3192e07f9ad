from .benchmark import (
    benchmark_recipes as benchmark_recipes,
    ground_truth as ground_truth,
    jpg_path as jpg_path,
    label as label,
    recipe_table as recipe_table,
    train_path as train_path,
    training_recipes as training_recipes,
    write_tables as write_tables,
)
from .drawing import (
    Light as Light,
    View as View,
    draw_view as draw_view,
    query_box as query_box,
    visible_fraction as visible_fraction,
)
from .photographs import (
    Photograph as Photograph,
    read_photographs as read_photographs,
    split_photographs as split_photographs,
)
from .rendering import render as render, write_views as write_views
