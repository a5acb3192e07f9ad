"""The live views in a real browser, with a kernel that is this process."""

import base64
import shutil

import pytest

from tests.viz.kernel_page import KernelPage
from tests.viz.test_photograph_instrument import SETTINGS
from vitgal.stages import own
from vitgal.viz.photograph_instrument import PhotographInstrument

pytestmark = pytest.mark.slow
DROPPED = """data => {
    const files = new DataTransfer();
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    files.items.add(new File([bytes], "<b>\\u202e.jpg", { type: "image/jpeg" }));
    return files;
}"""
CANVAS = "node => node.toDataURL()"


@pytest.fixture
def view(browser, photographs):
    live = KernelPage(browser, PhotographInstrument(photographs, "q.jpg", None, SETTINGS))
    yield live
    live.page.close()


def last(view) -> own.SearchResult:
    return list(view.widget._results.values())[-1]


def changed(page, act) -> str:
    """`act` redraws the pair: waits for another picture, and returns it."""
    before = page.locator("canvas.pair").evaluate(CANVAS)
    act()
    page.wait_for_function(
        "before => document.querySelector('canvas.pair').toDataURL() !== before", arg=before
    )
    return page.locator("canvas.pair").evaluate(CANVAS)


def test_own_photographs_are_accessible_and_a_box_is_drawn(view):
    page = view.page
    page.locator(".own .tile").first.wait_for()
    assert view.contrast_and_names() == []
    page.mouse.move(*corner(page, 0.25))
    page.mouse.down()
    page.mouse.move(*corner(page, 0.9))
    page.mouse.up()
    page.wait_for_function("document.querySelector('[aria-label=\"left of the box\"]').value > 0")
    left, top, right, bottom = last(view).box
    assert (left, top) == pytest.approx((32, 24), abs=2)  # of 128 x 96 pixels
    assert (right, bottom) == pytest.approx((115, 86), abs=2)
    assert view.contrast_and_names() == []
    first = page.locator(".own .tile").first.get_attribute("title")
    page.get_by_text("+ pair").first.click()
    assert page.locator("li").inner_text() == f"q.jpg – {first}"
    page.locator(".own .tile").first.click()
    page.locator("p", has_text="inliers on").wait_for()
    assert view.contrast_and_names() == []
    assert view.faults == []


def corner(page, part: float) -> tuple[float, float]:
    """The place at a fraction of the drawn query's width and height, in pixels of the page."""
    frame = page.locator("svg.boxed image").bounding_box()
    return frame["x"] + part * frame["width"], frame["y"] + part * frame["height"]


def test_overlays_and_patches_of_own_photographs(view):
    page = view.page
    page.locator(".own .tile").nth(1).click()
    page.locator("p", has_text="matches").first.wait_for()
    page.wait_for_function("document.querySelectorAll('.crops canvas').length > 0")
    overlay = page.get_by_label("overlay", exact=True)
    pictures = [page.locator("canvas.pair").evaluate(CANVAS)]
    for layer in ("0", "1", "3"):  # scores, norm, attention of the second head
        pictures.append(changed(page, lambda layer=layer: overlay.select_option(layer)))
    assert len(set(pictures)) == 4
    assert overlay.locator("option").count() == 3 + 4  # with the four heads of the network
    assert view.contrast_and_names() == []
    canvas = page.locator("canvas.pair")
    box = canvas.bounding_box()
    place = {"x": box["width"] / 4, "y": box["height"] / 2}
    changed(page, lambda: canvas.click(position=place))
    page.locator("p", has_text="Most similar patches").wait_for()
    assert page.locator(".crops canvas").count() == 3
    canvas.focus()
    changed(page, lambda: page.keyboard.press("Escape"))
    assert view.faults == []


def test_a_photograph_is_dropped_on_the_view(view, inspected_run):
    page = view.page
    content = (inspected_run / "jpg" / "b.jpg").read_bytes()
    files = page.evaluate_handle(DROPPED, base64.b64encode(content).decode())
    page.dispatch_event("#instrument .ranking", "dragover", {"dataTransfer": files})
    page.dispatch_event("#instrument .ranking", "drop", {"dataTransfer": files})
    page.wait_for_function("state.entry.queries[0].image >= state.entry.photographs.length")
    assert last(view).path.read_bytes() == content
    assert page.locator(".own .tile").first.get_attribute("title") == "b.jpg"
    files = page.evaluate_handle(DROPPED, base64.b64encode(b"no photograph").decode())
    page.dispatch_event("#instrument .ranking", "drop", {"dataTransfer": files})
    page.wait_for_function("state.busy && !state.busy.endsWith('…')")
    assert page.locator("[role=status]").inner_text().startswith("_b__.jpg: not an image")
    assert page.locator(".own .tile").first.get_attribute("title") == "b.jpg"  # as it was
    empty = page.evaluate_handle("new DataTransfer()")
    page.dispatch_event("#instrument .ranking", "drop", {"dataTransfer": empty})
    assert view.faults == []


def test_a_photograph_that_has_gone_is_a_grey_tile_with_its_name(
    browser, describer, inspected_run, tmp_path
):
    for letter, name in zip("qab", ("q", "'<b>\"", "🏰"), strict=True):
        shutil.copy(inspected_run / "jpg" / f"{letter}.jpg", tmp_path / f"{name}.jpg")
    folder = own.describe_folder(tmp_path, describer)
    (tmp_path / "'<b>\".jpg").unlink()
    view = KernelPage(browser, PhotographInstrument(folder, "q.jpg", None, SETTINGS))
    missing = view.page.locator(".tile .missing")
    missing.wait_for()
    assert missing.inner_text() == "'<b>\".jpg"
    missing.click()
    view.page.locator("p", has_text="inliers on").wait_for()  # its features are kept
    assert view.faults == []


def test_a_pair_does_not_wait_for_the_images_of_a_grid(browser, photographs):
    widget = PhotographInstrument(photographs, "q.jpg", None, SETTINGS)
    view = KernelPage(browser, widget, silent=["image"])
    view.page.locator(".own .tile").first.click()
    view.page.locator("p", has_text="inliers on").wait_for()
    assert view.asked == ["document", "image", "image", "pair"]
    assert view.faults == []


def test_a_kernel_that_ends_is_said_and_the_picture_stays(view):
    page = view.page
    page.locator(".own .tile").first.click()
    page.locator("p", has_text="inliers on").wait_for()
    page.wait_for_function("document.querySelectorAll('.crops canvas').length > 0")
    before = page.locator("canvas.pair").evaluate(CANVAS)
    view.silent = ["pair"]
    page.get_by_label("max_distance").fill("0.2")
    page.wait_for_function("state.source.waiting.size > 0")
    page.evaluate("listeners['comm_live_update']()")
    page.locator("p", has_text="The kernel has ended").wait_for()
    assert page.locator("canvas.pair").evaluate(CANVAS) == before
