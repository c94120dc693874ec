"""A real headless Chromium for the tests of pages: the system's own, driven by Playwright.

A test fails if its page logs an error, raises one, or asks for anything outside. Without Chromium or Playwright the
tests are skipped, or fail where REQUIRE_BROWSER=1 is set.
"""

import contextlib
import os
import shutil
import urllib.parse

import pytest

ARGUMENTS = [
    "--no-sandbox",  # which needs rights that a container may lack; the tests open their own pages only
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIMEOUT_MS = 10_000


def refuse(missing, command):
    """Skips the test, or fails it if REQUIRE_BROWSER=1."""
    message = f"tests of pages need {missing}, which is not installed; run `{command}`"
    if os.environ.get("REQUIRE_BROWSER") == "1":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


@contextlib.contextmanager
def launch_browser(*arguments):
    """Starts Chromium, with more arguments of its command line, and ends it after the block."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        refuse("Playwright", "pip install playwright")
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if path is None:
        refuse("Chromium", "apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*ARGUMENTS, *arguments])
        yield browser
        browser.close()


# Not of the session: Playwright runs an event loop, which other tests may need to do.
@pytest.fixture(name="browser", scope="module")
def browser_fixture():
    """A running Chromium."""
    with launch_browser() as browser:
        yield browser


@contextlib.contextmanager
def open_page(browser, url, **options):
    """Opens a page with cookies and storage of its own; the options are those of Playwright's `Browser.new_context`.

    `page.problems` are the errors and warnings that it logged or raised, and the addresses outside that it asked for.
    The block's end asserts that there are none; a test that expects one clears the list.
    """
    parts = urllib.parse.urlsplit(url)
    inside = ("data:", "blob:", f"{parts.scheme}://{parts.netloc}/")
    problems = []

    def check_message(message):
        if message.type in ("error", "warning"):
            problems.append(f"{message.type}: {message.text}")

    def check_request(request):
        if not request.url.startswith(inside):
            problems.append(f"asked for {request.url}")

    with contextlib.closing(browser.new_context(**options)) as context:
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        page.problems = problems
        page.on("console", check_message)
        page.on("pageerror", lambda error: problems.append(f"raised {error}"))
        page.on("request", check_request)
        page.goto(url)
        yield page
        assert not problems
