"""The page of beyond.serve in a real Chromium, with a captioner that needs no model."""

import base64
import io
import time

import numpy as np
import pytest
from helpers.browser import launch_browser, open_page
from helpers.web import FakeCaptioner, draw_png, load_image, run_server, wait_until
from PIL import Image
from werkzeug.exceptions import NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from captioning.config.settings import DecodeConfig

pytestmark = pytest.mark.slow

RED = {"name": "red.png", "mimeType": "image/png", "buffer": draw_png(size=(320, 240))}
GREEN = {"name": "green.png", "mimeType": "image/png", "buffer": draw_png("green")}
TEXT = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no image"}
# Makes an event that carries a file, as a drop and a paste do.
SEND_FILE = """([kind, content, type]) => {
  const data = new DataTransfer();
  if (content) data.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], "image", { type }));
  const options = { bubbles: true, cancelable: true };
  document.body.dispatchEvent(kind === "drop" ? new DragEvent(kind, { ...options, dataTransfer: data })
                                              : new ClipboardEvent(kind, { ...options, clipboardData: data }));
}"""


@pytest.fixture(scope="module")
def browser():
    """A Chromium with a camera, which shows a green picture."""
    with launch_browser("--use-fake-device-for-media-stream") as browser:
        yield browser


@pytest.fixture
def captioner():
    return FakeCaptioner(run="<i>small")


@pytest.fixture
def server(captioner):
    with run_server(captioner) as server:
        yield server


@pytest.fixture
def page(browser, server):
    with open_page(browser, server.url) as page:
        page.wait_for_function("() => document.querySelector('#run').innerText === 'run: <i>small'")
        yield page


def wait_for_caption(page, text):
    """Waits until the page shows a caption, and nothing else."""
    page.wait_for_function("text => document.querySelector('.cv-line')?.textContent === text", arg=text)
    page.wait_for_function("() => document.getElementById('status').textContent.startsWith('Captioned in ')")
    assert page.locator("#error").text_content() == ""


def wait_for_error(page, text):
    """Waits until the page shows an error, and forgets what the browser logs about it."""
    page.wait_for_function("text => document.getElementById('error').textContent.includes(text)", arg=text)
    assert page.get_by_role("alert").inner_text() == page.locator("#error").text_content()
    assert page.locator("#status").text_content() == ""
    page.problems[:] = [problem for problem in page.problems if "Failed to load resource" not in problem]


def wait_for_batches(captioner, count):
    """Waits until so many images were captioned; returns the settings of the last."""
    wait_until(lambda: len(captioner.batches) >= count)
    assert len(captioner.batches) == count
    return captioner.batches[-1][1]


def test_file_that_is_chosen_is_captioned(page, captioner):
    assert page.locator("#photo").is_hidden(), "only a phone has a camera behind a file input"
    page.set_input_files("#file", RED)
    wait_for_caption(page, "a red image")
    image = page.locator(".caption-viewer img")
    assert image.get_attribute("alt") == "a red image"
    assert image.evaluate("image => image.naturalWidth") == 320
    assert wait_for_batches(captioner, 1) == DecodeConfig()
    page.set_input_files("#file", GREEN)
    wait_for_caption(page, "a green image")
    assert page.locator(".caption-viewer").count() == 1


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_image_that_is_dropped_or_pasted_is_captioned(page, kind):
    page.evaluate(SEND_FILE, [kind, base64.b64encode(GREEN["buffer"]).decode(), "image/png"])
    wait_for_caption(page, "a green image")
    page.evaluate(SEND_FILE, [kind, "", ""])
    wait_for_error(page, "Expected an image file; save the image first")


def test_sliders_caption_again_once_they_rest(page, captioner):
    page.locator("#beam").fill("2")  # nothing to caption yet
    page.set_input_files("#file", RED)
    wait_for_caption(page, "a red image")
    assert wait_for_batches(captioner, 1) == DecodeConfig(beam_size=2)
    for value in ("5", "6", "7"):
        page.locator("#beam").fill(value)
    time.sleep(0.5)  # longer than the page waits before it asks
    assert wait_for_batches(captioner, 2) == DecodeConfig(beam_size=7)
    assert page.locator("output[for=beam]").inner_text() == "7"
    page.locator("#captions").fill("3")
    assert wait_for_batches(captioner, 3) == DecodeConfig(beam_size=7, captions=3)
    page.locator(".cv-alternatives li").nth(1).wait_for()


def test_random_words_have_a_temperature_and_can_be_drawn_again(page, captioner):
    page.set_input_files("#file", RED)
    wait_for_caption(page, "a red image")
    assert page.locator("#temperature").is_disabled() and page.locator("#again").is_hidden()
    page.get_by_label("Random words").check()
    assert wait_for_batches(captioner, 2) == DecodeConfig(sample=True)
    assert page.locator("#beam").is_disabled()
    page.get_by_label("Temperature").fill("0.5")
    assert wait_for_batches(captioner, 3) == DecodeConfig(sample=True, temperature=0.5)
    page.get_by_role("button", name="Draw again").click()
    assert wait_for_batches(captioner, 4) == DecodeConfig(sample=True, temperature=0.5, decode_seed=1)
    page.get_by_label("Random words").uncheck()
    assert wait_for_batches(captioner, 5) == DecodeConfig()


def test_settings_begin_with_the_defaults_of_the_server(browser):
    defaults = DecodeConfig(sample=True, temperature=0.75, captions=12, decode_seed=7)  # beyond the sliders' ends
    captioner = FakeCaptioner(defaults)
    with run_server(captioner) as server, open_page(browser, server.url) as page:
        page.set_input_files("#file", RED)
        wait_for_caption(page, "a red image")
        assert wait_for_batches(captioner, 1) == defaults


def test_page_works_below_a_path_of_a_proxy(browser, server):
    server.server.application = DispatcherMiddleware(NotFound(), {"/user/ann/proxy/8000": server.app})
    with open_page(browser, f"{server.url}user/ann/proxy/8000/") as page:
        page.set_input_files("#file", RED)
        wait_for_caption(page, "a red image")


def test_answer_that_comes_too_late_is_not_shown(page, captioner):
    captioner.may_end.clear()
    page.set_input_files("#file", RED)
    assert captioner.begun.wait(10)
    assert page.locator("#status").inner_text() == "Captioning …"
    page.set_input_files("#file", GREEN)
    page.wait_for_timeout(200)
    captioner.may_end.set()
    wait_for_caption(page, "a green image")
    page.wait_for_timeout(200)
    assert page.locator(".caption-viewer img").get_attribute("alt") == "a green image"


# What goes wrong.


def test_file_that_is_no_image_and_a_server_that_has_ended_are_named(page):
    page.set_input_files("#file", RED)
    wait_for_caption(page, "a red image")
    page.set_input_files("#file", TEXT)
    wait_for_error(
        page, "the image: not an image that can be read (not of a format that is read, such as JPEG, PNG or WebP)"
    )
    assert page.locator(".caption-viewer").count() == 0
    page.route("**/caption?*", lambda route: route.fulfill(status=413, body="<html>too large</html>"))
    page.set_input_files("#file", RED)
    wait_for_error(page, "The server, or a proxy before it, answered 413 and no caption.")
    page.unroute("**/caption?*")
    page.route("**/caption?*", lambda route: route.abort("connectionrefused"))
    page.set_input_files("#file", RED)
    wait_for_error(page, "The server does not answer. Is it still running?")


def test_image_that_is_too_large_is_scaled_down(browser, captioner, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 99, (200, 2200, 3), np.uint8)
    noise[..., 1] += 150
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    large = {"name": "large.png", "mimeType": "image/png", "buffer": file.getvalue()}
    sizes = []

    def note_size(content):
        sizes.append(Image.open(io.BytesIO(content)).size)
        return load_image(content)

    monkeypatch.setattr(captioner, "load_image", note_size)
    with run_server(captioner, max_mb=1) as server, open_page(browser, server.url) as page:
        page.set_input_files("#file", large)
        wait_for_caption(page, "a green image")
        assert page.locator("#status").inner_text().endswith("scaled down to 2048 pixels before it was sent.")
        page.set_input_files("#file", {**TEXT, "buffer": bytes(3_000_000)})
        wait_for_error(page, "Expected a file of at most 1 MB, found 3.0 MB.")
    assert sizes == [(2048, 186)]


def test_error_and_caption_do_not_stand_beside_each_other(browser, captioner):
    with run_server(captioner, max_mb=1) as server, open_page(browser, server.url) as page:
        page.set_input_files("#file", RED)
        wait_for_caption(page, "a red image")
        page.set_input_files("#file", {**TEXT, "buffer": bytes(3_000_000)})
        wait_for_error(page, "Expected a file of at most 1 MB")
        assert page.locator(".caption-viewer").count() == 0, "it is of another image"
        captioner.begun.clear()
        captioner.may_end.clear()
        page.set_input_files("#file", GREEN)
        assert captioner.begun.wait(10)
        page.evaluate(SEND_FILE, ["paste", "", ""])
        page.wait_for_function("() => document.getElementById('error').textContent.startsWith('Expected an image')")
        assert page.locator("#status").inner_text() == "Captioning …"
        captioner.may_end.set()
        wait_for_caption(page, "a green image")


def test_image_that_the_browser_cannot_show_is_captioned(page):
    file = io.BytesIO()
    Image.new("RGB", (30, 20), "blue").save(file, "TIFF")
    page.set_input_files("#file", {"name": "scan.tif", "mimeType": "image/tiff", "buffer": file.getvalue()})
    wait_for_caption(page, "a blue image")
    assert page.locator(".caption-viewer img").evaluate("image => image.naturalWidth") == 480  # what stands for it


# The camera.


def test_picture_of_the_camera_is_captioned(browser, server, captioner):
    with open_page(browser, server.url, permissions=["camera"]) as page:
        page.get_by_role("button", name="Use the camera").click()
        page.wait_for_function("() => document.getElementById('video').videoWidth > 0")
        assert page.locator("#shoot").evaluate("button => button === document.activeElement")
        page.evaluate("window.track = document.getElementById('video').srcObject.getTracks()[0]")
        page.get_by_role("button", name="Use the camera").click()
        page.wait_for_function("() => document.getElementById('video').srcObject?.getTracks()[0] !== track")
        assert page.evaluate("track.readyState") == "ended", "the first stream"
        page.evaluate("window.track = document.getElementById('video').srcObject.getTracks()[0]")
        page.wait_for_function("() => document.getElementById('video').videoWidth > 0")
        page.get_by_role("button", name="Take the picture").click()
        wait_for_caption(page, "a green image")  # the picture of Chromium's camera
        assert page.evaluate("track.readyState") == "ended"  # its light is off
        assert page.locator("#viewfinder").is_hidden()
        page.get_by_role("button", name="Use the camera").click()
        page.wait_for_function("() => document.getElementById('video').videoWidth > 0")
        page.keyboard.press("Escape")
        assert page.locator("#viewfinder").is_hidden()
        assert page.locator("#camera").evaluate("button => button === document.activeElement")
    assert len(captioner.batches) == 1


def test_camera_that_cannot_be_used_is_named(page):
    page.get_by_role("button", name="Use the camera").click()
    wait_for_error(page, "The camera may not be used: the browser was told to refuse it. Choose a file instead.")
    page.evaluate("Object.defineProperty(navigator, 'mediaDevices', {value: undefined})")  # of a page without https
    page.get_by_role("button", name="Use the camera").click()
    wait_for_error(page, "only to pages of this machine")


# Phones and keyboards.


def test_page_fits_a_phone(browser, captioner):
    captioner = FakeCaptioner(DecodeConfig(captions=3))
    options = {"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True}
    with run_server(captioner) as server, open_page(browser, server.url, **options) as page:
        assert page.get_by_label("Take a photo").is_visible()
        page.set_input_files("#capture", RED)
        wait_for_caption(page, "a red image")
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        page.locator(".cv-word").nth(1).tap()
        assert page.locator(".cv-status").inner_text() == "red, 25 %"
        heights = page.locator("label.button, button:visible:not(.cv-word)").evaluate_all(
            "all => all.map(e => e.offsetHeight)"
        )
        assert min(heights) >= 44, "a finger needs so many pixels"


def test_page_works_by_keyboard(page):
    page.locator("body").click(position={"x": 1, "y": 1})
    page.keyboard.press("Tab")
    assert page.locator("#file").evaluate("input => input === document.activeElement")
    assert page.locator("label:has(#file)").evaluate("label => getComputedStyle(label).outlineStyle") == "solid"
    page.keyboard.press("Tab")
    assert page.locator("#camera").evaluate("button => button === document.activeElement")
    page.set_input_files("#file", RED)
    wait_for_caption(page, "a red image")
    page.keyboard.press("Tab")
    assert page.locator(".cv-status").inner_text() == "a, 50 %"
