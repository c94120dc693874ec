"""The page and the figures of web/viewer.js in a real Chromium: by mouse, keyboard and finger."""

import numpy as np
import pytest
from helpers.browser import browser_fixture, open_page  # noqa: F401 (pytest finds the fixture here)
from PIL import Image
from report_pages import (
    BORDER,
    GREY,
    HOSTILE,
    SIZE,
    STILL,
    brightest,
    lit_words,
    make_caption,
    make_result,
    open_entries,
    pixels_of,
)

from beyond.report.notebook import caption_html
from captioning.output.plots import upsample_attention

pytestmark = pytest.mark.slow


# The light.


def test_hovering_a_word_lights_where_the_model_attended(browser, tmp_path):
    with open_entries(browser, tmp_path, {"result": make_result("a b c d")}, **STILL) as page:
        before = pixels_of(page)
        assert before.std() < 2
        for location, word in enumerate("abcd"):
            page.get_by_role("button", name=f"{word},").hover()
            pixels = pixels_of(page)
            row, column = brightest(pixels)
            assert (row > 0.85, column > 0.85) == (location >= 2, location % 2 == 1), word
            assert (row < 0.15, column < 0.15) == (location < 2, location % 2 == 0), word
            assert pixels.max() >= before.max(), "full light where the weight is largest"
            assert np.median(pixels) < 0.3 * before.mean(), "dark elsewhere"
            assert lit_words(page) == [word]
        page.locator("h1").hover()
        assert lit_words(page) == [] and np.array_equal(pixels_of(page), before)


@pytest.mark.parametrize(("image", "num_locations"), [(GREY, 16), (Image.new("RGB", SIZE), 64)])
def test_light_equals_the_light_of_the_plots(browser, tmp_path, image, num_locations):
    weights = np.random.default_rng(0).dirichlet(np.full(num_locations, 0.3))
    result = make_result("a")
    result["words"][0]["attention"] = weights.tolist()
    with open_entries(browser, tmp_path, {"image": image, "result": result}, **STILL) as page:
        page.locator(".cv-word").hover()
        pixels = pixels_of(page)
    expected = upsample_attention(weights, SIZE)[BORDER:-BORDER, BORDER:-BORDER]
    assert np.corrcoef(pixels.ravel(), expected.ravel())[0, 1] > 0.99
    assert pixels.max() > 15, "a dark image is lit, too"


# Mouse, keyboard, finger.


def test_clicked_word_stays_lit_until_another_click(browser, tmp_path):
    with open_entries(browser, tmp_path, {}, {"result": make_result("two cats")}, **STILL) as page:
        word = page.get_by_role("button", name="red,")
        word.click()
        page.locator("h1").hover()
        assert lit_words(page) == ["red"] and word.get_attribute("aria-pressed") == "true"
        page.get_by_role("button", name="dog,").hover()
        assert lit_words(page) == ["dog"], "hovering shows another meanwhile"
        page.get_by_role("button", name="cats,").click()
        page.locator("h1").hover()
        assert lit_words(page) == ["cats"] and word.get_attribute("aria-pressed") == "false"
        page.get_by_role("button", name="cats,").click()
        assert lit_words(page) == []
        word.click()
        page.locator("h1").click()
        assert lit_words(page) == []


def test_keyboard_moves_between_words(browser, tmp_path):
    with open_entries(
        browser, tmp_path, {"result": make_result(alternatives=[make_result("two cats")])}, **STILL
    ) as page:
        page.get_by_role("button", name="dog,").hover()  # the keyboard takes over from a mouse that rests
        page.locator("#order").focus()
        seen = []
        for key in ("Tab", "Tab", "ArrowRight", "ArrowRight", "ArrowLeft", "Shift+Tab", "ArrowLeft"):
            page.keyboard.press(key)
            assert page.evaluate("document.activeElement.textContent") == lit_words(page)[0]
            seen += lit_words(page)
        assert seen == ["a", "red", "dog", "dog", "red", "a", "a"]
        assert brightest(pixels_of(page)) < (0.15, 0.15)
        page.keyboard.press("Escape")
        assert lit_words(page) == [] and pixels_of(page).std() < 2
        for _ in range(3):
            page.keyboard.press("Tab")
        assert lit_words(page) == ["two"]
        for _ in range(2):
            page.keyboard.press("Tab")
        assert lit_words(page) == [], "the focus has left the figure"


def test_keyboard_follows_the_direction_of_writing(browser, tmp_path):
    with open_entries(browser, tmp_path, {"result": make_result("كلب أحمر كبير")}) as page:
        first, second, _ = page.locator(".cv-word").all()
        assert first.bounding_box()["x"] > second.bounding_box()["x"], "from right to left"
        first.focus()
        page.keyboard.press("ArrowLeft")
        assert lit_words(page) == ["أحمر"]


def test_tapped_word_stays_lit(browser, tmp_path):
    phone = {"viewport": {"width": 400, "height": 800}, "has_touch": True, "is_mobile": True}
    with open_entries(browser, tmp_path, {}, **phone, **STILL) as page:
        page.locator(".cv-word").first.dispatch_event("pointerenter", {"pointerType": "touch"})
        assert lit_words(page) == [], "a finger that scrolls"
        for name in ("red,", "dog,"):
            page.get_by_role("button", name=name).tap()
        assert page.locator("[aria-pressed=true]").all_inner_texts() == lit_words(page) == ["dog"]
        page.get_by_role("button", name="dog,").tap()
        assert lit_words(page) == []
        assert page.locator(".cv-word").first.bounding_box()["height"] >= 32, "room for a finger"


# The text.


def test_words_and_captions_have_their_probability(browser, tmp_path):
    other = make_result("two cats", log_prob=-4.25, confidence=0.001)
    with open_entries(browser, tmp_path, {"result": make_result("a red dog runs", alternatives=[other])}) as page:
        names = [word.get_attribute("aria-label") for word in page.locator(".cv-line").first.locator("button").all()]
        assert names == ["a, 98 %", "red, 50 %", "dog, 2 %", "runs, < 1 %"]
        status = page.locator(".cv-status")
        assert status.inner_text() == "log p \u22123.10, confidence 42 %"
        page.get_by_role("button", name="cats,").hover()
        assert status.inner_text() == "cats, 50 %"
        alternatives = page.locator(".cv-alternatives li").all_inner_texts()
        assert alternatives == ["two cats\n\nlog p \u22124.25, confidence < 1 %"]
        assert page.locator("img").get_attribute("alt") == "a red dog runs"


def test_caption_has_spaces_where_its_text_has_them(browser, tmp_path):
    cases = {
        "a red dog": (["a", "red", "dog"], "a red dog"),
        "一只狗": (["一", "只", "狗"], "一只狗"),
        "iphone 手机": (["iphone", "手", "机"], "iphone 手机"),
        "another text": (["two", "words"], "two words"),  # of a tokenizer that changes words
        "": ([], "(no words)"),
    }
    entries = [{"result": make_result(text, words)} for text, (words, _) in cases.items()]
    with open_entries(browser, tmp_path, *entries, {"result": make_result("a dog", finished=False)}) as page:
        page.locator(".caption-viewer").nth(5).wait_for()
        expected = [text for _, text in cases.values()]
        assert page.locator(".cv-line").all_text_contents() == [*expected, "a dog …"]
        assert page.locator(".cv-cut").get_attribute("title") == "cut: the model predicted no end"


def test_markup_in_captions_and_names_stays_text(browser, tmp_path):
    similar = [{"image": HOSTILE, "cosine": 0.804, "captions": [HOSTILE]}]
    result = make_result(HOSTILE, alternatives=[make_result(HOSTILE)], consensus=26.76, similar_images=similar)
    with open_entries(browser, tmp_path, {"name": HOSTILE, "result": result, "references": [HOSTILE]}) as page:
        assert page.locator("h2").text_content() == page.locator(".people li").text_content() == HOSTILE
        plain = " ".join(HOSTILE.split())
        assert [" ".join(line.split()) for line in page.locator(".cv-line").all_text_contents()] == [plain, plain]
        assert page.locator(".cv-similar p").text_content() == f"{HOSTILE}, cosine 0.80"
        assert page.locator(".cv-similar li").text_content() == HOSTILE
        assert page.locator(".cv-status").inner_text().endswith(", consensus 27")
        assert page.locator("img").count() == 1 and page.locator("b").count() == 0


# The page.


def entries_to_search():
    return [
        {"name": "four.jpg", "result": make_result("a fish", confidence=0.5)},
        {"name": "one.jpg", "result": make_result("a red dog"), "references": ["My Hound"], "score": 30.0},
        {"name": "two.jpg", "result": make_result("a black cat", confidence=0.1), "score": 10.0},
        {"name": "three.jpg", "result": make_result("a black dog", confidence=0.9), "score": 20.0},
    ]


def test_search_finds_captions_names_and_references(browser, tmp_path):
    with open_entries(browser, tmp_path, *entries_to_search()) as page:
        assert page.locator("#count").inner_text() == "4 images"
        for typed, expected in (
            ("dog", ["one.jpg", "three.jpg"]),
            ("DOG  black", ["three.jpg"]),
            ("hound", ["one.jpg"]),
            ("two.jpg", ["two.jpg"]),
            ("a/b", []),  # in the field the slash is a letter
            ("attention", []),  # of the JSON
        ):
            page.keyboard.press("/")  # selects the text that is in the field
            page.keyboard.type(typed)
            assert page.locator("article:visible h2").all_text_contents() == expected
            assert page.locator("#count").inner_text() == f"{len(expected)} of 4"
            page.locator("#order").focus()


def test_order_can_be_chosen(browser, tmp_path):
    with open_entries(browser, tmp_path, *entries_to_search()) as page:
        for label, expected in (
            ("lowest CIDEr first", "two three one four"),
            ("highest CIDEr first", "one three two four"),
            ("least confident first", "two one four three"),
            ("original order", "four one two three"),
        ):
            page.locator("#order").select_option(label)
            assert page.locator("h2").all_text_contents() == [f"{name}.jpg" for name in expected.split()]


def test_figures_are_made_near_the_visible_part(browser, tmp_path):
    entries = [{"name": f"{number}.jpg", "result": make_result(f"caption {number}")} for number in range(300)]
    with open_entries(browser, tmp_path, *entries, viewport={"width": 900, "height": 600}) as page:
        assert 0 < page.locator(".caption-viewer").count() < 20
        page.locator("#search").fill("caption 299")
        page.get_by_role("button", name="299,").hover()
        assert lit_words(page) == ["299"] and page.locator("#count").inner_text() == "1 of 300"


def test_page_without_javascript_shows_captions(browser, tmp_path):
    with open_entries(browser, tmp_path, {"references": ["a dog runs"]}, java_script_enabled=False) as page:
        assert page.locator("figcaption").inner_text() == "a red dog" and page.locator("img").is_visible()
        assert page.get_by_text("a dog runs").is_visible() and not page.locator("#tools").is_visible()


# The viewer in other pages.


def test_outputs_of_a_notebook_share_one_page(browser, tmp_path):
    """Each output has the script, and comes later than the page."""
    insert = """(html) => {
      const output = document.createElement("div");
      document.body.append(output);
      output.append(document.createRange().createContextualFragment(html));  // which runs scripts
    }"""
    (tmp_path / "a.html").write_text("<!doctype html><meta charset=utf-8><title>a</title>")
    with open_page(browser, (tmp_path / "a.html").as_uri(), **STILL) as page:
        for text in ("a red dog", "two cats"):
            page.evaluate(insert, caption_html(make_caption(text, image=GREY)))
        assert page.locator(".caption-viewer").count() == 2 and page.locator(".caption-viewer-plain").count() == 0
        page.get_by_role("button", name="cats,").click()
        page.get_by_role("button", name="red,").click()
        assert lit_words(page) == ["red"], "one word of the page stays lit"
