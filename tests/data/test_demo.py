"""The demo data set: photographs, recipes, labels, pixels, the stage."""

import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from vitgal import runs
from vitgal.data import gldv2
from vitgal.data.demo import benchmark as demo_benchmark, photographs as demo_photographs, views
from vitgal.data.demo.views import invert, map_points
from vitgal.data.revisited import load_ground_truth, open_dataset
from vitgal.settings.sections import DemoSettings, SettingsError
from vitgal.stages import demo

BUNDLED = Path(__file__).resolve().parents[2] / demo_photographs.PHOTOGRAPHS
SETTINGS = DemoSettings(view_size=320, train_views=12)
IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
HEADER = "file,author,licence,source,width,height\n"
SMALL = [  # four photographs of three landmarks, one of them for training
    ("eiffel_tower", 1, 96, 72),
    ("eiffel_tower", 2, 60, 80),
    ("petra", 1, 80, 64),
    ("red_pyramid", 1, 72, 72),
]


def pattern(width, height, seed):
    """Coloured blobs, so that views of different photographs differ."""
    noise = np.random.default_rng(seed).integers(60, 256, (height // 8, width // 8, 3), np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def write_photographs(folder, photographs=SMALL):
    lines = []
    for landmark, number, width, height in photographs:
        (folder / landmark).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / landmark / f"{number}.jpg"), pattern(width, height, number))
        lines.append(f"{landmark}/{number}.jpg,A. Author,CC0-1.0,,{width},{height}\n")
    (folder / "ATTRIBUTION.csv").write_text(HEADER + "".join(lines))
    return folder


@pytest.fixture
def photographs(tmp_path):
    return write_photographs(tmp_path / "photographs")


@pytest.fixture(scope="module")
def bundled():
    return demo_photographs.read_photographs(BUNDLED)


@pytest.fixture(scope="module")
def recipes(bundled):
    train, benchmark = demo_photographs.split_photographs(bundled)
    training = demo_benchmark.training_recipes(train, SETTINGS)
    return training, *demo_benchmark.benchmark_recipes(benchmark, SETTINGS)


def photograph(width=100, height=80, region=(0.0, 0.0, 100.0, 80.0), name="petra_1"):
    landmark = name.rpartition("_")[0]
    return demo_photographs.Photograph(
        landmark, name, Path("none.jpg"), width, height, "A. Author", "CC0-1.0", "", region
    )


def plain_view(photograph, **changed):
    light = views.Light(1.0, (1.0, 1.0, 1.0), 1.0, False, False, 0.0, 95)
    view = views.View(
        name="view",
        photograph=photograph,
        size=(photograph.width, photograph.height),
        matrix=IDENTITY,
        tilt=0.0,
        rotation=0.0,
        window=1.0,
        light=light,
        occluder=None,
        noise_seed=1,
        visible=1.0,
        strength=0.0,
    )
    return replace(view, **changed)


# The bundled photographs


def test_bundled_photographs_split_by_landmark(bundled):
    train, benchmark = demo_photographs.split_photographs(bundled)
    sides = [{item.landmark for item in part} for part in (train, benchmark)]
    assert len(bundled) == 85 and [len(side) for side in sides] == [49, 24]
    assert len(train) == 49 and len(benchmark) == 36
    assert not sides[0] & sides[1] and sides[1] == set(demo_photographs.BENCHMARK_LANDMARKS)
    # What a Paris test set shows, and both names of the place at Giza, are not trained on.
    paris = {"notre_dame_paris", "arc_du_carrousel", "louvre_pyramid", "eiffel_tower"}
    assert paris | {"great_pyramid", "giza_pyramids"} <= sides[1]
    counts = pd.Series([item.landmark for item in bundled]).value_counts()
    assert set(counts[counts > 1].index) <= sides[1] and (counts > 1).sum() == 10


def test_bundled_regions_are_hand_made_for_the_benchmark(bundled):
    listed = set(pd.read_csv(BUNDLED / demo_photographs.REGIONS)["file"])
    assert listed == {
        f"{item.landmark}/{item.path.name}"
        for item in demo_photographs.split_photographs(bundled)[1]
    }
    christ = next(item for item in bundled if item.name == "christ_the_redeemer_1")
    # 60,30,80,70 per cent of 768 x 514 pixels.
    assert christ.region == pytest.approx((460.8, 154.2, 614.4, 359.8))
    pisa = next(item for item in bundled if item.name == "tower_of_pisa_1")
    assert pisa.region == pytest.approx((0.12 * 212, 32.0, 0.88 * 212, 0.92 * 320))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "must hold rows"),
        (HEADER, "must hold rows"),
        ("file,author\npetra/1.jpg,A\n", "must hold rows"),
        (HEADER + "petra/1.jpg,A,CC0,,80,\n", "petra/1.jpg needs a width and a height"),
        (HEADER + "petra/1.jpg,A,CC0,,0,64\n", "petra/1.jpg needs a width and a height"),
        (HEADER + "petra/1.jpg,A,,,80,64\n", "petra/1.jpg needs"),
        (HEADER + 2 * "petra/1.jpg,A,CC0,,80,64\n", "lists petra/1.jpg more than once"),
    ],
)
def test_wrong_attribution_is_refused(photographs, table, message):
    (photographs / "ATTRIBUTION.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        demo_photographs.read_photographs(photographs)


@pytest.mark.parametrize("region", ["0,0,100,101", "50,0,50,100", "0,0,x,100", "-1,0,9,9"])
def test_wrong_regions_are_refused(photographs, region):
    (photographs / "REGIONS.csv").write_text(f"file,x0,y0,x1,y1\npetra/1.jpg,{region}\n")
    with pytest.raises(ValueError, match=r"REGIONS\.csv: the region of petra/1\.jpg"):
        demo_photographs.read_photographs(photographs)


def test_missing_photographs_are_named(photographs):
    (photographs / "petra" / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 4 photographs .*first petra/1\.jpg"):
        demo_photographs.read_photographs(photographs)
    with pytest.raises(FileNotFoundError, match="ATTRIBUTION.csv is missing"):
        demo_photographs.read_photographs(photographs / "nowhere")


# Geometry


def test_homography_of_an_untilted_view_is_a_similarity():
    # A window of half a 100 x 80 photograph around (60, 30) in a view of 200 x 160: 4 pixels each.
    matrix = views.tilted_board((60, 30), 100, (0, 0, 0), 4.0, (200, 160))
    assert map_points(matrix, 60, 30) == (100, 80)
    assert map_points(matrix, 35, 10) == (0, 0)
    assert map_points(matrix, 85, 50) == (200, 160)
    turned = views.tilted_board((60, 30), 100, (0, 0, 30), 4.0, (200, 160))
    x, y = map_points(turned, 70, 30)
    assert math.hypot(x - 100, y - 80) == pytest.approx(40)
    # 30 degrees clockwise on the screen (y runs down); the half-angle form is off by 0.7 of them.
    assert math.degrees(math.atan2(y - 80, x - 100)) == pytest.approx(30, abs=0.7)


def test_a_tilted_board_is_foreshortened_and_its_near_side_larger():
    matrix = views.tilted_board((50, 40), 100, (40, 0, 0), 1.0, (100, 80))
    left, right = map_points(matrix, 0, 40)[0], map_points(matrix, 100, 40)[0]
    assert map_points(matrix, 50, 40) == (50, 40)
    # Seen at 40 degrees from a distance of 1.7 sides (170): X cos 40 / (1 - X sin 40 / 170).
    half = 40 * math.pi / 360
    cos, sin = (1 - half**2) / (1 + half**2), 2 * half / (1 + half**2)
    assert left == pytest.approx(50 - 50 * cos / (1 + 50 * sin / 170))
    assert right == pytest.approx(50 + 50 * cos / (1 - 50 * sin / 170))
    heights = [map_points(matrix, x, 80)[1] - map_points(matrix, x, 0)[1] for x in (0, 100)]
    assert heights[0] < 80 < heights[1]


ANGLE = st.floats(-45, 45)


@given(st.tuples(ANGLE, ANGLE, ANGLE), st.floats(0.2, 8), st.floats(0, 100), st.floats(0, 80))
def test_the_inverse_of_a_view_leads_back_to_the_photograph(angles, scale, x, y):
    matrix = views.tilted_board((60, 30), 100, angles, scale, (200, 160))
    assert map_points(invert(matrix), *map_points(matrix, x, y)) == pytest.approx((x, y), abs=1e-6)


@given(st.tuples(ANGLE, ANGLE, ANGLE), st.floats(0.2, 8))
def test_a_query_box_lies_in_the_view_and_around_the_whole_region(angles, scale):
    region = (20.0, 10.0, 80.0, 70.0)
    matrix = views.tilted_board((50, 40), 100, angles, scale, (200, 160))
    view = plain_view(photograph(region=region), matrix=matrix, size=(200, 160))
    x0, y0, x1, y1 = views.query_box(view)
    assert 0 <= x0 <= x1 <= 200 and 0 <= y0 <= y1 <= 160
    for corner in ((20, 10), (80, 10), (20, 70), (80, 70), (50, 40)):
        x, y = map_points(matrix, *corner)
        assert x0 - 0.1 <= min(max(x, 0), 200) <= x1 + 0.1
        assert y0 - 0.1 <= min(max(y, 0), 160) <= y1 + 0.1


def test_visible_fraction_counts_what_is_inside_and_not_behind():
    region = (0.0, 0.0, 100.0, 80.0)
    assert views.visible_fraction(IDENTITY, region, (100, 80)) == 1
    assert views.visible_fraction(IDENTITY, region, (50, 80)) == 0.5
    assert views.visible_fraction(IDENTITY, region, (50, 20)) == 0.125
    shifted = ((1.0, 0.0, 100.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    assert views.visible_fraction(shifted, region, (100, 80)) == 0
    # An ellipse that touches all four sides leaves 1 - pi / 4 free; a 32 x 32 grid counts its
    # border points to within about a point each of its 4 x 32 border cells, far less in the mean.
    hidden = views.visible_fraction(IDENTITY, region, (100, 80), (0.5, 0.5, 0.5, 0.5))
    assert hidden == pytest.approx(1 - math.pi / 4, abs=0.01)


def test_query_box_is_the_region_clipped_to_the_view():
    view = plain_view(photograph(region=(10.0, 20.0, 90.04, 70.0)))
    assert views.query_box(view) == (10.0, 20.0, 90.0, 70.0)
    moved = ((1.0, 0.0, -25.0), (0.0, 1.0, 30.0), (0.0, 0.0, 1.0))
    assert views.query_box(replace(view, matrix=moved)) == (0.0, 50.0, 65.0, 80.0)


def test_views_stay_within_the_photograph(recipes):
    for view in (*recipes[0], *recipes[1], *recipes[2]):
        sides = view.photograph.width, view.photograph.height
        over = views.overhang(view.matrix, sides, view.size)
        assert over <= views.OVERHANG or view.window == views.MIN_WINDOW
        assert over < 0.2 and max(view.size) == 320 and min(view.size) >= 80


# Recipes


def test_a_recipe_depends_on_no_other_photograph(bundled, recipes):
    _, benchmark = demo_photographs.split_photographs(bundled)
    single = [item for item in benchmark if item.landmark == "taj_mahal"]
    queries, database = demo_benchmark.benchmark_recipes(single, SETTINGS)
    assert queries == [view for view in recipes[1] if view.photograph.landmark == "taj_mahal"]
    assert database == [view for view in recipes[2] if view.photograph.landmark == "taj_mahal"]


def test_recipes_follow_the_seed(bundled):
    single, same, other = (
        demo_benchmark.training_recipes(bundled[:1], DemoSettings(seed, 64, 3))
        for seed in (1, 1, 2)
    )
    assert single == same
    assert all(
        a.matrix != b.matrix and a.name != b.name for a, b in zip(single, other, strict=True)
    )


def test_mild_views_have_no_event_and_strength_grows_with_level(bundled):
    mild, strong = (
        [views.draw_view(bundled[0], "v", level, seed=[9, i], view_size=64) for i in range(100)]
        for level in (views.QUERY_LEVEL, 1.0)
    )
    for view in mild:
        assert not (view.light.night or view.light.grey or view.light.blur or view.occluder)
        assert abs(view.rotation) <= 6 and view.tilt <= 9.2
    # Chances at full strength: night 0.4, occluder 0.6; 100 draws, four standard deviations.
    assert abs(sum(view.light.night for view in strong) - 40) < 20
    assert abs(sum(view.occluder is not None for view in strong) - 60) < 20
    assert max(view.strength for view in mild) < min(0.35, np.mean([v.strength for v in strong]))


def test_strength_adds_up():
    light = views.Light(1.5, (1.2, 1.0, 0.8), 1.0, False, True, 2.0, 50)
    # 0.4 * 22.5/45 + 0.25 * 15/30 + 0.3 * 0.5 + 0.4 + 0.3 * 0.5 + 0.5 * 0.2 + 0.12 * 2
    assert views._strength(22.5, -15.0, 0.5, light) == pytest.approx(1.365)


# Labels


@pytest.mark.parametrize(
    ("query", "view", "visible", "strength", "expected"),
    [
        ("petra_1", "petra_1", 0.60, 0.45, "easy"),
        ("petra_1", "petra_1", 0.59, 0.1, "hard"),
        ("petra_1", "petra_1", 0.99, 0.46, "hard"),
        ("petra_1", "petra_1", 0.15, 2.0, "hard"),
        ("petra_1", "petra_1", 0.14, 0.0, "junk"),
        ("petra_1", "petra_2", 0.99, 0.0, "hard"),
        ("petra_1", "petra_2", 0.50, 0.6, "hard"),
        ("petra_1", "petra_2", 0.49, 0.0, "junk"),
        ("petra_1", "petra_2", 0.99, 0.61, "junk"),
        ("petra_1", "chambord_1", 1.0, 0.0, "negative"),
        ("great_pyramid_1", "giza_pyramids_1", 1.0, 0.0, "junk"),
        ("giza_pyramids_1", "great_pyramid_1", 0.0, 0.0, "junk"),
    ],
)
def test_labels_follow_the_stated_rule(query, view, visible, strength, expected):
    seen = plain_view(photograph(name=view), visible=visible, strength=strength)
    assert demo_benchmark.label(plain_view(photograph(name=query)), seen) == expected


def test_benchmark_is_a_useful_one(recipes):
    _, queries, database = recipes
    truth = demo_benchmark.ground_truth(queries, database)
    assert (len(truth.queries), len(truth.database)) == (50, 288)
    easy, hard, junk = (
        [len(images) for images in lists] for lists in (truth.easy, truth.hard, truth.junk)
    )
    assert min(easy) >= 1 and min(hard) >= 1 and min(junk) >= 1
    assert 2 <= np.mean(easy) <= 5 and np.mean(hard) > np.mean(easy)
    for query, box, view in zip(truth.queries, truth.boxes, queries, strict=True):
        x0, y0, x1, y1 = box
        assert 0 <= x0 < x1 <= view.size[0] and 0 <= y0 < y1 <= view.size[1]
        assert (x1 - x0) * (y1 - y0) >= 0.05 * view.size[0] * view.size[1], query
        assert view.visible >= 0.8
    q = next(q for q, name in enumerate(truth.queries) if name.startswith("giza"))
    assert {truth.database[i] for i in truth.junk[q]} >= {
        name for name in truth.database if name.startswith("great_pyramid")
    }


def test_tables_are_the_same_on_every_machine(tmp_path, recipes):
    demo_benchmark.write_tables(tmp_path, *recipes)
    digests = {name: runs.fingerprint_file(tmp_path / name)[:12] for name in demo_benchmark.TABLES}
    # Recorded once: recipes, boxes and labels of seed 0. They change with the photographs, their
    # regions or the rule, and with nothing else.
    assert digests == {
        "train.csv": "0365f331a813",
        "views.csv": "60fb6f3763fd",
        "benchmark/views.csv": "beee5fc2ff1b",
        "benchmark/gnd_demo.pkl": "9ad311393ce0",
    }


# Pixels


def test_a_point_is_drawn_where_the_recipe_maps_it():
    image = np.zeros((80, 100, 3), np.uint8) + 40
    cv2.circle(image, (70, 30), 3, (255, 255, 255), -1)  # its middle is at (70.5, 30.5)
    matrix = views.tilted_board((60, 35), 100, (30, 10, -20), 3.0, (200, 160))
    view = plain_view(photograph(), matrix=matrix, size=(200, 160), window=0.6)
    grey = views.render(view, image).mean(axis=2)
    rows, columns = np.nonzero(grey > 150)
    x, y = map_points(matrix, 70.5, 30.5)
    # The disc is 20 pixels wide there; noise moves its rim's middle by far less than half a pixel.
    assert (columns + 0.5).mean() == pytest.approx(x, abs=0.5)
    assert (rows + 0.5).mean() == pytest.approx(y, abs=0.5)


def test_beyond_the_border_is_no_black():
    image = np.full((80, 100, 3), 128, np.uint8)
    matrix = views.tilted_board((95, 5), 100, (0, 0, 25), 1.0, (100, 80))
    pixels = views.render(plain_view(photograph(), matrix=matrix), image)
    # Noise has a standard deviation of 0.012 * 255 = 3 and, being uniform, at most 5.3 either way.
    assert pixels.min() >= 122 and pixels.max() <= 134


def test_render_is_deterministic_and_applies_colour_changes():
    image, view = pattern(100, 80, 3), plain_view(photograph())
    assert np.array_equal(views.render(view, image), views.render(view, image))
    other = views.render(replace(view, noise_seed=2), image)
    assert not np.array_equal(other, views.render(view, image))
    grey = views.render(replace(view, light=replace(view.light, grey=True)), image).astype(int)
    assert np.abs(grey[..., 0] - grey[..., 2]).max() <= 11  # twice the noise's reach
    warm = replace(view.light, balance=(1.2, 1.0, 0.8))
    red, _, blue = views.render(
        replace(view, light=warm), np.full((80, 100, 3), 100, np.uint8)
    ).mean(axis=(0, 1))
    assert (red, blue) == pytest.approx((120, 80), abs=0.5)  # 8000 pixels of noise 3


def test_a_black_photograph_is_brightened():
    night = replace(plain_view(photograph()).light, night=True, gain=0.5)
    view = plain_view(photograph(), light=night)
    assert views.render(view, np.zeros((80, 100, 3), np.uint8)).mean() >= 0.8 * views.MIN_MEAN


def test_no_bundled_view_is_dark(bundled):
    train, benchmark = demo_photographs.split_photographs(bundled)
    settings = DemoSettings(view_size=64, train_views=12)
    queries, database = demo_benchmark.benchmark_recipes(benchmark, settings)
    recipes = [*demo_benchmark.training_recipes(train, settings)[::3], *queries, *database]
    pictures = {item.name: item.read() for item in bundled}
    for view in recipes:
        pixels = views.render(view, pictures[view.photograph.name])
        assert pixels.mean() >= 0.9 * views.MIN_MEAN, view.name  # clipping takes some off again
        assert pixels.mean() <= 250, view.name


# The stage


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("stage.json", ".lock")
    }


def make(run, photographs, **changed):
    overwrite = changed.pop("overwrite", False)
    settings = DemoSettings(**{"view_size": 48, "train_views": 3} | changed)
    return demo.make_demo(run, settings, photographs=photographs, overwrite=overwrite)


def test_stage_has_the_real_data_sets_layouts(tmp_path, photographs):
    folder = make(tmp_path / "run", photographs)
    table = gldv2.read_landmark_table(folder / "train.csv")
    assert len(table) == 3 and table["landmark_id"].nunique() == 1
    assert gldv2.missing_images(folder / "train", table["id"]) == []
    assert all(len(image) == 16 and int(image, 16) >= 0 for image in table["id"])
    dataset = open_dataset("demo", folder / "benchmark")
    assert dataset.ground_truth.queries == [
        "eiffel_tower_1_q0",
        "eiffel_tower_2_q0",
        "petra_1_q0",
        "petra_1_q1",
    ]
    assert dataset.database[7:9] == ["eiffel_tower_1_v07", "eiffel_tower_2_v00"]
    assert len(dataset.database) == 24
    recorded = pd.read_csv(folder / "benchmark" / "views.csv")
    assert set(recorded["name"]) == {*dataset.ground_truth.queries, *dataset.database}
    assert set(recorded["licence"]) == {"CC0-1.0"} and set(recorded["author"]) == {"A. Author"}
    truth = load_ground_truth(folder / "benchmark" / "gnd_demo.pkl")
    easy = {truth.database[i] for images in truth.easy for i in images}
    assert easy == set(recorded.loc[recorded["label"] == "easy", "name"])
    for path in (*dataset.database_paths, *(folder / "train").rglob("*.jpg")):
        assert max(cv2.imread(str(path)).shape[:2]) == 48


def test_stage_repeats_itself_and_is_reused(tmp_path, photographs):
    first = files(make(tmp_path / "one", photographs))
    assert files(make(tmp_path / "two", photographs)) == first
    written = (tmp_path / "one" / "data" / "stage.json").stat().st_mtime_ns
    make(tmp_path / "one", photographs)
    assert (tmp_path / "one" / "data" / "stage.json").stat().st_mtime_ns == written
    other = files(make(tmp_path / "one", photographs, seed=1, overwrite=True))
    assert set(other) != set(first)  # training ids follow the seed


def test_stage_refuses_other_settings(tmp_path, photographs):
    make(tmp_path / "run", photographs)
    with pytest.raises(runs.StageError, match="view_size: 48 there, 40 now"):
        make(tmp_path / "run", photographs, view_size=40)
    cv2.imwrite(str(photographs / "petra" / "1.jpg"), pattern(80, 64, 77))
    with pytest.raises(runs.StageError, match="inputs.photographs"):
        make(tmp_path / "run", photographs)


def test_unusable_photographs_stop_it_before_it_begins(tmp_path, photographs):
    run, path = tmp_path / "run", photographs / "petra" / "1.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"petra/1\.jpg: the file is cut short"):
        make(run, photographs)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"petra/1\.jpg: the file is empty"):
        make(run, photographs)
    cv2.imwrite(str(path), pattern(64, 80, 1))
    with pytest.raises(ValueError, match=r"petra/1\.jpg is 64 x 80 pixels, .* 80 x 64"):
        make(run, photographs)
    with pytest.raises(FileNotFoundError, match="ATTRIBUTION.csv is missing"):
        make(run, tmp_path / "nowhere")
    with pytest.raises(SettingsError, match="demo_views"):
        make(run, photographs, train_views=0)
    write_photographs(tmp_path / "one side", SMALL[:3])
    with pytest.raises(ValueError, match="0 are for training and 3 for the benchmark"):
        make(run, tmp_path / "one side")
    assert not run.exists()


def test_one_view_a_photograph_is_enough(bundled):
    settings = DemoSettings(view_size=48, train_views=1)
    assert len(demo_benchmark.training_recipes(bundled, settings)) == len(bundled)
    _, database = demo_benchmark.benchmark_recipes(bundled[:3], settings, views=1)
    assert [view.name for view in database] == [f"{item.name}_v00" for item in bundled[:3]]
