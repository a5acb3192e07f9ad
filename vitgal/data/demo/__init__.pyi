from .benchmark import (
    benchmark_recipes as benchmark_recipes,
    ground_truth as ground_truth,
    label as label,
    recipe_table as recipe_table,
    training_recipes as training_recipes,
    write_tables as write_tables,
)
from .photographs import (
    Photograph as Photograph,
    read_photographs as read_photographs,
    split_photographs as split_photographs,
)
from .views import (
    Light as Light,
    View as View,
    draw_view as draw_view,
    query_box as query_box,
    render as render,
    visible_fraction as visible_fraction,
    write_views as write_views,
)
