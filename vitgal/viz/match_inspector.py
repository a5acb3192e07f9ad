"""A query and a database image with their matches, attention and dropped features."""

from dataclasses import dataclass, replace

from matplotlib.axes import Axes

from vitgal.stages.inspection import ComparedPair, Inspector
from vitgal.viz.matching import MatchedImage, match_lines


@dataclass(frozen=True)
class Layers:
    """What `inspected_matches` draws besides the inliers.

    Attributes:
        rejected: the matches that are no inliers.
        outline: the query's box, and its image under the homography.
        dropped: crosses at dropped tokens.
        attention: scale and head (from 0; None: all) of the attention map; None: no map.
    """

    rejected: bool = True
    outline: bool = True
    dropped: bool = False
    attention: tuple[float, int | None] | None = None


def inspected_matches(
    inspector: Inspector,
    query: int,
    image: int,
    pair: ComparedPair,
    layers: Layers,
    *,
    max_lines: int = 100,
) -> Axes:
    """Draws the compared pair of a query and a database image, given by index.

    Attention and dropped tokens are drawn of those images for which `inspector.selection` has
    been called. layers: the drawn layers besides inliers. max_lines: most inliers, and most
    rejected matches, that are drawn.
    """
    sides = []
    for side, features in ((("query", query), pair.query), (("database", image), pair.database)):
        selection = inspector.selections.get(side)
        matched = MatchedImage(inspector.image(*side), features, inspector.name(*side))
        if selection and layers.dropped:
            matched = replace(matched, dropped=selection.dropped)
        if selection and layers.attention:
            matched = replace(matched, heat=selection.heat(*layers.attention))
        sides.append(matched)
    outline, rejected = layers.outline, layers.rejected
    return match_lines(*sides, pair.result, outline=outline, rejected=rejected, max_lines=max_lines)
