"""A headless Chromium, the system's own, in which tests use the pages as a person does."""

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    """The browser, for one module: while it is there, an event loop runs in this thread.

    Skips where there is none, but not in CI, which installs it.
    """
    if CHROMIUM is None:
        if os.environ.get("CI") == "true":
            pytest.fail("there is no Chromium; scripts/test.sh installs it when it may")
        pytest.skip("there is no Chromium; install the package chromium")
    with sync_playwright() as playwright:
        # no sandbox: the tests run as root in a container, and what they open is made by themselves
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium) -> Iterator[Page]:
    """A page that reaches this machine alone: a request to any other fails the test."""
    context = chromium.new_context(viewport={"width": 1200, "height": 900})
    outside: list[str] = []

    def judge(route) -> None:
        if route.request.url.startswith(("http://127.0.0.1", "http://localhost", "file:", "data:", "blob:", "ws://127.0.0.1")):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    context.route("**/*", judge)
    yield context.new_page()
    context.close()
    assert not outside, f"the page asked another machine: {outside}"
