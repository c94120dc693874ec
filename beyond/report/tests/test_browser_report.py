"""The page of captions in a real Chromium; test_browser_viewer.py tests its figures."""

import re

import numpy as np
import pytest
from helpers.browser import browser_fixture  # noqa: F401 (pytest finds the fixture here)
from PIL import Image
from report_pages import lit_words, make_result, open_report, write_page

pytestmark = pytest.mark.slow


def entries_to_search():
    return [
        {"name": "one.jpg", "result": make_result("a red dog"), "references": ["My Hound"], "score": 30.0},
        {"name": "two.jpg", "result": make_result("a black cat", confidence=0.1), "score": 10.0},
        {"name": "three.jpg", "result": make_result("a black dog", confidence=0.9), "score": 20.0},
        {"name": "four.jpg", "result": make_result("a fish", confidence=0.5)},
    ]


def shown_names(page):
    return page.locator("article:visible h2").all_text_contents()


def test_search_finds_captions_names_and_references(browser, tmp_path):
    with open_report(browser, write_page(tmp_path / "a.html", *entries_to_search())) as page:
        for typed, expected in (
            ("dog", ["one.jpg", "three.jpg"]),
            ("DOG  black", ["three.jpg"]),
            ("hound", ["one.jpg"]),
            ("two.jpg", ["two.jpg"]),
            ("unicorn", []),
            ("attention", []),  # of the JSON
        ):
            page.keyboard.press("/")  # selects what was typed before
            page.keyboard.type(typed)
            assert shown_names(page) == expected
            assert page.locator("#found").inner_text() == f"{len(expected)} of 4"
            page.locator("#order").focus()
        page.locator("#search").fill("")
        assert len(shown_names(page)) == 4 and page.locator("#found").inner_text() == ""


def test_search_field_takes_a_slash(browser, tmp_path):
    with open_report(browser, write_page(tmp_path / "a.html", {})) as page:
        page.locator("#search").focus()
        page.keyboard.type("a/b")
        assert page.locator("#search").input_value() == "a/b"


def test_order_can_be_chosen(browser, tmp_path):
    *scored, unscored = [{"score_name": "CIDEr", **entry} for entry in entries_to_search()]
    with open_report(browser, write_page(tmp_path / "a.html", unscored, *scored)) as page:
        for label, expected in (
            ("lowest CIDEr first", "two three one four"),
            ("highest CIDEr first", "one three two four"),
            ("least confident first", "two one four three"),
            ("original order", "four one two three"),
        ):
            page.locator("#order").select_option(label)
            assert shown_names(page) == [f"{name}.jpg" for name in expected.split()]


def test_order_of_a_page_without_scores_is_of_confidence(browser, tmp_path):
    with open_report(browser, write_page(tmp_path / "a.html", {})) as page:
        assert page.locator("option").all_inner_texts() == ["original order", "least confident first"]


def test_figures_are_made_where_one_scrolls_to(browser, tmp_path):
    entries = [{"name": f"{number}.jpg", "result": make_result(f"caption {number}")} for number in range(1100)]
    with open_report(
        browser, write_page(tmp_path / "a.html", *entries), viewport={"width": 900, "height": 600}
    ) as page:
        assert 0 < page.locator(".caption-viewer").count() < 20
        page.locator("#search").fill("caption 1099")
        page.get_by_role("button", name="1099,").hover()
        assert lit_words(page) == ["1099"] and page.locator("#found").inner_text() == "1 of 1,100"
        page.locator("#search").fill("")
        page.evaluate("scrollTo(0, document.body.scrollHeight / 2)")
        page.locator(".caption-viewer").nth(10).wait_for()
        assert page.locator(".caption-viewer").count() < 60


@pytest.mark.parametrize("width", [320, 400, 1200])
def test_nothing_is_wider_than_the_page(browser, tmp_path, width):
    long = "x" * 400
    wide = Image.new("RGB", (900, 100))
    url = write_page(
        tmp_path / "a.html",
        {"references": ["one", "two"], "result": make_result(alternatives=[make_result("two cats on a mat")] * 3)},
        {"image": wide, "name": long, "result": make_result(long, alternatives=[make_result(long)]), "score": 2.0},
        {"references": [long], "score": 1e9, "score_name": "CIDEr"},
    )
    with open_report(browser, url, viewport={"width": width, "height": 700}, has_touch=width < 500) as page:
        page.locator("#search").fill("e")
        page.locator("#search").fill("")
        page.locator("article").last.scroll_into_view_if_needed()
        page.locator(".caption-viewer").nth(2).wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        right = "Math.max(...[...document.querySelectorAll('body *')].map((e) => e.getBoundingClientRect().right))"
        assert page.evaluate(right) <= width


def contrast(one, other):
    def luminance(colour):
        channels = np.asarray(colour, float)[:3] / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


COLOURS = """(element) => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const grounds = [];
  for (let one = element; one; one = one.parentElement) grounds.push(parse(getComputedStyle(one).backgroundColor));
  return [parse(getComputedStyle(element).color), grounds];
}"""


def contrast_of(locator):
    """Returns the contrast of a text with what lies behind it, as computed by WCAG 2."""
    colour, grounds = locator.evaluate(COLOURS)
    ground = np.full(3, 255.0)
    for *channels, alpha in reversed([[*each, 1][:4] for each in grounds]):
        ground = alpha * np.asarray(channels) + (1 - alpha) * ground
    return contrast(colour, ground)


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_all_text_can_be_read(browser, tmp_path, color_scheme):
    result = make_result("a b c d e", finished=False, alternatives=[make_result("a b")])
    url = write_page(
        tmp_path / "a.html",
        {"result": result, "references": ["one"], "score": 1.0, "score_name": "CIDEr"},
        {"result": make_result("")},
    )
    with open_report(browser, url, color_scheme=color_scheme) as page:
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) < 150) == (color_scheme == "dark")
        selectors = "h1, h2, h3, header p, .about p, .people li, .cv-word, .cv-status, .cv-scores, .cv-cut, .cv-none"
        for element in page.locator(f"{selectors}, #search, #order").all():
            assert contrast_of(element) >= 4.5, element.evaluate("(element) => element.outerHTML")
        page.locator(".cv-word").first.hover()
        assert contrast_of(page.locator(".cv-lit")) >= 4.5
        tints = page.locator(".cv-line").nth(1).locator(".cv-word").all()  # 98 % and 50 %
        backgrounds = [tint.evaluate("(element) => getComputedStyle(element).backgroundColor") for tint in tints]
        assert len(set(backgrounds)) == 2, "shaded by probability"


def test_page_without_javascript_shows_captions(browser, tmp_path):
    url = write_page(tmp_path / "a.html", {"references": ["a dog runs"]})
    with open_report(browser, url, java_script_enabled=False) as page:
        assert page.locator("figcaption").inner_text() == "a red dog" and page.locator("img").is_visible()
        assert page.get_by_text("a dog runs").is_visible() and not page.locator("#tools").is_visible()


def test_page_may_load_and_run_nothing_else(browser, tmp_path):
    with open_report(browser, write_page(tmp_path / "a.html", {})) as page:
        page.evaluate("document.body.append(Object.assign(new Image(), { src: 'https://example.invalid/a.png' }))")
        page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), { text: 'window.ran = 1' }))"
        )
        page.wait_for_timeout(100)
        assert page.evaluate("window.ran") is None
        assert len([problem for problem in page.problems if "Content Security Policy" in problem]) == 2
        page.problems.clear()
