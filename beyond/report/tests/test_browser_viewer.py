"""The figure of web/viewer.js in a real Chromium: by mouse, keyboard and finger, in the page and elsewhere."""

import json

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
    make_result,
    one_hot,
    open_report,
    pixels_of,
    quarters,
    write_page,
)

from beyond.report.report import WEB, notebook_html
from captioning.output.plots import upsample_attention

pytestmark = pytest.mark.slow


# The light.


def test_hovering_a_word_lights_where_the_model_looked(browser, tmp_path):
    with open_report(browser, write_page(tmp_path / "a.html", {"result": make_result("a b c d")}), **STILL) as page:
        page.set_viewport_size({"width": 1200, "height": 800})
        before = pixels_of(page)
        assert before.std() < 2
        for location, word in enumerate("abcd"):
            page.get_by_role("button", name=f"{word},").hover()
            pixels = pixels_of(page)
            assert np.argmax(quarters(pixels)) == location, word
            row, column = brightest(pixels)
            assert (row > 0.85, column > 0.85) == (location >= 2, location % 2 == 1)
            assert (row < 0.15, column < 0.15) == (location < 2, location % 2 == 0)
            assert pixels.max() >= before.max(), "full light where the weight is largest"
            assert np.median(pixels) < 0.3 * before.mean(), "dark elsewhere"
            assert lit_words(page) == [word]
        page.mouse.move(600, 790)
        assert lit_words(page) == [] and np.array_equal(pixels_of(page), before)


def test_light_is_smooth_and_of_any_square_grid(browser, tmp_path):
    words = [
        {"word": "small", "probability": 0.5, "attention": one_hot(5, 16)},  # the second location in the second row
        {"word": "even", "probability": 0.5, "attention": [1 / 64] * 64},
        {"word": "none", "probability": 0.5, "attention": [0] * 64},
        {"word": "bare", "probability": 0.5},
    ]
    result = make_result(words=[]) | {"caption": "small even none bare", "words": words}
    with open_report(browser, write_page(tmp_path / "a.html", {"result": result}), **STILL) as page:
        before = pixels_of(page)
        looks = {}
        for word in ("small", "even", "none", "bare"):
            page.get_by_role("button", name=word).hover()
            looks[word] = pixels_of(page)
        assert brightest(looks["small"]) == pytest.approx((0.375, 0.375), abs=0.02)
        assert np.abs(np.diff(looks["small"], axis=0)).max() < 20, "no edge of a location can be seen"
        assert looks["even"].min() >= before.min() and looks["even"].std() < 3
        assert looks["none"].max() < 0.5 * before.mean()
        assert np.array_equal(looks["bare"], before), "a word without attention darkens nothing"


def test_light_is_that_of_the_plots(browser, tmp_path):
    weights = np.random.default_rng(0).dirichlet(np.full(64, 0.3))
    result = make_result("a")
    result["words"][0]["attention"] = weights.tolist()
    with open_report(browser, write_page(tmp_path / "a.html", {"result": result}), **STILL) as page:
        page.locator(".cv-word").hover()
        pixels = pixels_of(page)
    expected = upsample_attention(weights, SIZE)[BORDER:-BORDER, BORDER:-BORDER]
    assert np.corrcoef(pixels.ravel(), expected.ravel())[0, 1] > 0.99


def test_dark_image_is_lit_too(browser, tmp_path):
    entry = {"image": Image.new("RGB", SIZE), "result": make_result("a b c d")}
    with open_report(browser, write_page(tmp_path / "a.html", entry), **STILL) as page:
        page.get_by_role("button", name="b,").hover()
        assert np.argmax(quarters(pixels_of(page))) == 1 and pixels_of(page).max() > 15


# Mouse, keyboard, finger.


def test_clicked_word_stays_lit_until_another_click(browser, tmp_path):
    url = write_page(tmp_path / "a.html", {}, {"result": make_result("two cats")})
    with open_report(browser, url, **STILL) as page:
        word = page.get_by_role("button", name="red,")
        word.click()
        page.locator("h1").hover()
        assert lit_words(page) == ["red"] and word.get_attribute("aria-pressed") == "true"
        page.get_by_role("button", name="dog,").hover()
        assert lit_words(page) == ["dog"], "hovering shows another meanwhile"
        page.locator("h1").hover()
        assert lit_words(page) == ["red"]
        page.get_by_role("button", name="cats,").click()
        page.locator("h1").hover()
        assert lit_words(page) == ["cats"] and word.get_attribute("aria-pressed") == "false"
        page.get_by_role("button", name="cats,").click()
        assert lit_words(page) == []
        word.click()
        page.locator("h1").click()
        assert lit_words(page) == []


def test_keyboard_moves_between_words(browser, tmp_path):
    url = write_page(tmp_path / "a.html", {"result": make_result(alternatives=[make_result("two cats")])})
    with open_report(browser, url, **STILL) as page:
        page.locator("#order").focus()
        seen = []
        for key in ("Tab", "Tab", "ArrowRight", "ArrowRight", "ArrowLeft", "Shift+Tab", "ArrowLeft", "End"):
            page.keyboard.press(key)
            assert page.evaluate("document.activeElement.textContent") == lit_words(page)[0]
            seen += lit_words(page)
        assert seen == ["a", "red", "dog", "dog", "red", "a", "a", "a"]
        assert brightest(pixels_of(page)) < (0.15, 0.15)
        page.keyboard.press("Escape")
        assert lit_words(page) == [] and pixels_of(page).std() < 2
        for _ in range(3):
            page.keyboard.press("Tab")
        assert lit_words(page) == ["two"]
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        assert lit_words(page) == [], "focus has left the figure"


def test_keyboard_takes_over_from_a_mouse_that_rests(browser, tmp_path):
    with open_report(browser, write_page(tmp_path / "a.html", {}), **STILL) as page:
        page.get_by_role("button", name="dog,").hover()
        page.locator("#order").focus()
        page.keyboard.press("Tab")
        assert lit_words(page) == ["a"]


def test_keyboard_follows_the_direction_of_writing(browser, tmp_path):
    with open_report(browser, write_page(tmp_path / "a.html", {"result": make_result("كلب أحمر كبير")})) as page:
        first, second, _ = page.locator(".cv-word").all()
        assert first.bounding_box()["x"] > second.bounding_box()["x"], "from right to left"
        first.focus()
        page.keyboard.press("ArrowLeft")
        assert lit_words(page) == ["أحمر"]


def test_keyboard_keeps_the_keys_of_the_browser(browser, tmp_path):
    """Alt and an arrow goes back a page."""
    press = """(word, keys) => {
      return word.dispatchEvent(new KeyboardEvent("keydown", { bubbles: true, cancelable: true, ...keys }));
    }"""
    with open_report(browser, write_page(tmp_path / "a.html", {})) as page:
        word = page.get_by_role("button", name="red,")
        assert not word.evaluate(press, {"key": "ArrowRight"}), "the page would scroll"
        for modifier in ("altKey", "ctrlKey", "metaKey", "shiftKey"):
            assert word.evaluate(press, {"key": "ArrowRight", modifier: True})
        assert word.evaluate(press, {"key": "ArrowDown"})


def test_finger_that_scrolls_lights_nothing(browser, tmp_path):
    with open_report(browser, write_page(tmp_path / "a.html", {})) as page:
        page.locator(".cv-word").first.dispatch_event("pointerenter", {"pointerType": "touch"})
        assert lit_words(page) == []
        page.locator(".cv-word").first.dispatch_event("pointerenter", {"pointerType": "pen"})
        assert lit_words(page) == ["a"]


def test_tapped_word_stays_lit(browser, tmp_path):
    phone = {"viewport": {"width": 400, "height": 800}, "has_touch": True, "is_mobile": True}
    with open_report(browser, write_page(tmp_path / "a.html", {}), **phone, **STILL) as page:
        before = pixels_of(page)
        page.get_by_role("button", name="red,").tap()
        assert lit_words(page) == ["red"] and np.argmax(quarters(pixels_of(page))) == 1
        page.get_by_role("button", name="dog,").tap()
        assert lit_words(page) == ["dog"] and np.argmax(quarters(pixels_of(page))) == 2
        assert page.locator("[aria-pressed=true]").all_inner_texts() == ["dog"]
        page.get_by_role("button", name="dog,").tap()
        assert lit_words(page) == [] and np.array_equal(pixels_of(page), before)
        page.get_by_role("button", name="dog,").tap()
        page.locator("h1").tap()
        assert lit_words(page) == []
        height = page.locator(".cv-word").first.bounding_box()["height"]
        assert height >= 32, "room for a finger"


# The text.


def test_words_and_captions_are_named_with_their_probability(browser, tmp_path):
    result = make_result("a red dog runs", alternatives=[make_result("two cats", log_prob=-4.25, confidence=0.001)])
    result["words"][1]["gate"] = 0.826
    with open_report(browser, write_page(tmp_path / "a.html", {"result": result})) as page:
        names = [word.get_attribute("aria-label") for word in page.locator(".cv-line").first.locator("button").all()]
        assert names == ["a, 98 %", "red, 50 %, gate 0.83", "dog, 2 %", "runs, < 1 %"]
        assert page.locator(".cv-word").first.get_attribute("title") == "a, 98 %"
        status = page.locator(".cv-status")
        assert status.get_attribute("aria-live") == "polite"
        assert status.inner_text() == "log p \u22123.10, confidence 42 %"
        page.get_by_role("button", name="cats,").hover()
        assert status.inner_text() == "cats, 50 %"
        assert page.locator(".cv-alternatives li").all_inner_texts() == [
            "two cats\n\nlog p \u22124.25, confidence < 1 %"
        ]
        assert page.locator("img").get_attribute("alt") == "a red dog runs"
        assert page.locator(".cv-alternatives").get_attribute("start") == "2"
        assert page.locator("canvas").get_attribute("aria-hidden") == "true"


def test_caption_has_spaces_where_its_text_has_them(browser, tmp_path):
    cases = {
        "a red dog": (["a", "red", "dog"], "a red dog"),
        "一只狗": (["一", "只", "狗"], "一只狗"),
        "iphone 手机": (["iphone", "手", "机"], "iphone 手机"),
        "another text": (["two", "words"], "two words"),  # of a tokenizer that changes words
        "": ([], "(no words)"),
    }
    entries = [{"result": make_result(text, words)} for text, (words, _) in cases.items()]
    with open_report(browser, write_page(tmp_path / "a.html", *entries)) as page:
        page.locator(".caption-viewer").nth(4).wait_for()
        assert page.locator(".cv-line").all_text_contents() == [expected for _, expected in cases.values()]
        assert page.locator(".cv-word").count() == sum(len(words) for words, _ in cases.values())


def test_caption_without_end_says_so(browser, tmp_path):
    url = write_page(tmp_path / "a.html", {"result": make_result("a dog", finished=False)})
    with open_report(browser, url) as page:
        assert page.locator(".cv-line").text_content() == "a dog …"
        assert page.locator(".cv-cut").get_attribute("title") == "cut: the model predicted no end"


def test_markup_in_captions_and_names_stays_text(browser, tmp_path):
    result = make_result(HOSTILE, alternatives=[make_result(HOSTILE)])
    entry = {"name": HOSTILE, "result": result, "references": [HOSTILE], "score": 1.0, "score_name": HOSTILE}
    with open_report(browser, write_page(tmp_path / "a.html", entry)) as page:
        assert page.locator("h2").text_content() == page.locator(".people li").text_content() == HOSTILE
        assert [line.text_content() for line in page.locator(".cv-line").all()] == [HOSTILE, HOSTILE]
        assert page.locator("img").count() == 1 and page.locator("b").count() == 0
        page.locator(".cv-word").nth(1).hover()
        assert page.locator(".cv-status").text_content() == "src=x, 50 %"


# The viewer in other pages.


def test_notebook_fragments_stand_in_one_page(browser, tmp_path):
    """As in a notebook: each output has the script, and comes later than the page."""
    (tmp_path / "a.html").write_text(
        "<!doctype html><meta charset=utf-8><title>a</title><style>button{margin:9px}</style>"
    )
    insert = """(html) => {
      const output = document.createElement("div");
      document.body.append(output);
      output.append(document.createRange().createContextualFragment(html));  // scripts run, as notebooks see to
    }"""
    with open_page(browser, (tmp_path / "a.html").as_uri(), **STILL) as page:
        for number, text in enumerate(("a red dog", "two cats")):
            page.evaluate(insert, notebook_html(GREY, make_result(text)))
            page.evaluate(f"captionViewer.number ??= {number}")
        assert page.evaluate("captionViewer.number") == 0, "the first serves all"
        assert page.locator(".caption-viewer").count() == 2 and page.locator(".caption-viewer-plain").count() == 0
        page.get_by_role("button", name="cats,").click()
        page.get_by_role("button", name="red,").hover()
        assert lit_words(page) == ["red", "cats"] and np.argmax(quarters(pixels_of(page))) == 1
        page.get_by_role("button", name="red,").click()
        assert lit_words(page) == ["red"], "one word of the page is kept"


def test_create_takes_an_address_and_returns_an_element(browser, tmp_path):
    GREY.save(tmp_path / "grey.png")
    page_text = "<!doctype html><meta charset=utf-8><title>a</title><script src=viewer.js></script>"
    (tmp_path / "a.html").write_text(page_text)
    for name in ("viewer.js", "viewer.css"):
        (tmp_path / name).write_text((WEB / name).read_text(encoding="utf-8"), encoding="utf-8")
    with open_page(browser, (tmp_path / "a.html").as_uri()) as page:
        result = json.dumps(make_result())
        page.evaluate(f"document.body.append(captionViewer.create('grey.png', 'the alt text', {result}))")
        assert page.locator("figure.caption-viewer img").get_attribute("alt") == "the alt text"
        page.wait_for_function("document.querySelector('img').naturalWidth === 240")
