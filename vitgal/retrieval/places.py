"""Places: groups of photographs that verified pairs connect, without labels."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Place:
    """A place that several photographs show, by falling support: the first is best.

    members: (n,) int64, indices of photographs. support: (n,) float64, the sum of a photograph's
    probabilities with those it is linked to. links: (n,) int64, the number of these.
    """

    members: np.ndarray
    support: np.ndarray
    links: np.ndarray


def group_places(
    pairs: np.ndarray, probabilities: np.ndarray, threshold: float = 0.5
) -> list[Place]:
    """Groups images into places by the probabilities of verified pairs.

    A pair at or above the threshold is a link. Two images are of one place where two paths that
    share no link join them: so a single wrong pair, which is a bridge in the graph of links, cannot
    merge two places (they are its 2-edge-connected components). An image that is left alone joins
    the place of its strongest link; two of them that are linked form a place of two.

    pairs: (P, 2) int, indices of images, each pair once in any order. probabilities: (P,). Returns
    the places of at least two images, the largest first, equal ones by the lowest index.
    """
    import networkx

    pairs, probabilities = np.asarray(pairs).reshape(-1, 2), np.asarray(probabilities, np.float64)
    if len(pairs) != len(probabilities):
        raise ValueError(f"{len(pairs)} pairs and {len(probabilities)} probabilities")
    linked = (probabilities >= threshold) & (pairs[:, 0] != pairs[:, 1])
    order = np.lexsort((*np.sort(pairs, axis=1).T[::-1], -probabilities))
    links = [
        (*pairs[index].tolist(), float(probabilities[index])) for index in order[linked[order]]
    ]
    graph = networkx.Graph()
    graph.add_weighted_edges_from(links)
    components = networkx.k_edge_components(graph, k=2)
    places = [set(members) for members in components if len(members) > 1]
    place_of = {image: members for members in places for image in members}
    firmly = set(place_of)
    for first, second, _ in links:  # the strongest first
        inside = [image in place_of for image in (first, second)]
        if not any(inside):
            places.append({first, second})
            place_of |= {first: places[-1], second: places[-1]}
        elif not all(inside) and (known := second if inside[1] else first) in firmly:
            joining = first if inside[1] else second
            place_of[known].add(joining)
            place_of[joining] = place_of[known]
    places.sort(key=lambda members: (-len(members), min(members)))
    return [_place(graph.subgraph(members)) for members in places]


def _place(graph) -> Place:
    """Describes the place that a networkx graph of links spans."""
    support = dict(graph.degree(weight="weight"))
    members = sorted(graph, key=lambda image: (-support[image], image))
    return Place(
        members=np.array(members, np.int64),
        support=np.array([support[image] for image in members]),
        links=np.array([graph.degree(image) for image in members], np.int64),
    )
