"""The real App in a real browser, as a person uses it; shared by the journeys and the guide's pictures."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 120_000  # milliseconds
expect.set_options(timeout=PATIENCE)
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# the server alone: a session in Python tells it, sometime after it has started, that no dataset is open
_SERVE = "import sys; from fiftyone.server.main import start_server; start_server(int(sys.argv[1]), '127.0.0.1')"
# what the thumbnails on screen say of some fields, in reading order
_READ_GRID = """fields => [...document.querySelectorAll("[data-cy=looker]")]
    .map(tile => ({tile, at: tile.getBoundingClientRect()}))
    .filter(({at}) => at.width && at.top > 0 && at.bottom < innerHeight)
    .sort((a, b) => Math.round((a.at.top - b.at.top) / 20) || a.at.left - b.at.left)
    .map(({tile}) => fields.map(name => tile.querySelector(`[data-cy="tag-${name}"]`)?.textContent ?? null))"""


class App:
    """A page of the App on one dataset."""

    def __init__(self, page, port):
        self.page, self.port = page, port

    def open(self, dataset, shown="train"):
        """Opens a dataset, on the samples with a tag."""
        if not dataset.has_saved_view(shown):
            dataset.save_view(shown, dataset.match_tags(shown))
        self.page.goto(f"http://127.0.0.1:{self.port}/datasets/{dataset.name}?view={shown}")
        self.wait_for_count(len(dataset.match_tags(shown)))
        self.page.keyboard.press("Escape")  # an offer can lie over the App
        return self

    # the grid

    def wait_for_count(self, count):
        """Waits until the grid says how many samples it shows."""
        said = re.compile(rf"^{count:,} samples?$")
        expect(self.page.locator("[data-cy=entry-counts]").first).to_have_text(said)

    def thumbnails(self, expected, *fields):
        """Waits until the first thumbnails on screen say this of their fields, and says what they say."""
        for _ in range(120):
            shown = [row[0] if len(fields) == 1 else tuple(row) for row in self.page.evaluate(_READ_GRID, list(fields))]
            count = min(len(shown), len(expected))
            if count and shown[:count] == list(expected)[:count]:
                break
            self.page.wait_for_timeout(500)
        return shown[:count]

    def tick(self, number):
        """Selects a thumbnail, or takes the selection back."""
        tile = self.page.locator("[data-cy=looker]").nth(number)
        tile.hover(position={"x": 20, "y": 20})
        tile.click(position={"x": 12, "y": 12})

    def sidebar(self, field):
        """The field in the sidebar."""
        return self.page.locator(f"[data-cy=sidebar-field-container-{field}]")

    # forms

    def form(self, label):
        """Opens the form of an operator."""
        self.page.keyboard.press("`")
        self.page.get_by_placeholder("Search operations").fill(label)
        self.page.get_by_text(label, exact=True).last.click()
        return Form(self.page)

    def said(self, text):
        """Waits for a text that starts like that, and returns the whole of it."""
        found = self.page.get_by_text(text).first
        found.wait_for(timeout=PATIENCE)
        return found.text_content()  # it may be fading already

    def close(self):
        """Closes the form, which shows how a job went or what came of it."""
        closing = self.page.get_by_role("button", name="Done").or_(self.page.get_by_role("button", name="Close"))
        press(closing.first)
        expect(self.page.get_by_role("dialog")).to_have_count(0)

    # the panel

    def panel(self):
        """Opens the panel, or turns to it where it is open."""
        tab = self.page.locator("[data-cy=panel-tab-influence_panel]")
        if not tab.count():
            press(self.page.locator("[data-cy=new-panel-btn]").first)
            press(self.page.get_by_text("Influence", exact=True).last)
        tab.wait_for()
        return self.page.locator("[data-cy=panel-content-influence_panel]")

    def turn_to(self, name):
        """Another page of the panel."""
        press(self.page.get_by_role("tab", name=name, exact=True))
        expect(self.page.get_by_role("tab", name=name, exact=True)).to_have_attribute("aria-selected", "true")

    def choose(self, label, option):
        """Chooses in a dropdown of the panel."""
        _choose(self.page, self.page, label, option)

    def drag_over_histogram(self, left, right):
        """Drags over the panel's histogram, from one share of its width to another."""
        box = self.page.locator("[data-cy=panel-content-influence_panel] .nsewdrag").first.bounding_box()
        self.page.mouse.move(box["x"] + left * box["width"], box["y"] + 0.1 * box["height"])
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + right * box["width"], box["y"] + 0.9 * box["height"], steps=10)
        self.page.mouse.up()

    def lasso(self, left, right):
        """Draws a lasso around part of the panel's scatter plot, from one share of its width to another."""
        plot = self.page.locator("[data-cy=panel-content-influence_panel] .nsewdrag").nth(1)
        plot.scroll_into_view_if_needed()
        self.page.wait_for_timeout(1000)
        box = plot.bounding_box()
        corners = [(left, 0.02), (right, 0.02), (right, 0.98), (left, 0.98), (left, 0.04)]
        for number, (x, y) in enumerate(corners):
            self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=8)
            if number == 0:
                self.page.mouse.down()
        self.page.mouse.up()


class Form:
    """The form of an operator."""

    def __init__(self, page):
        self._page, self.body = page, page.get_by_role("dialog")
        self.body.wait_for()

    def fill(self, **values):
        """Types into the inputs with these labels, whose spaces are underscores."""
        for label, value in values.items():
            box = self.body.locator(f"xpath=.//p[.='{label.replace('_', ' ')}']/following::input[1]")
            box.fill(str(value))
        return self

    def holds(self, **values):
        """Waits until the inputs with these labels, whose spaces are underscores, hold these values."""
        for label, value in values.items():
            box = self.body.locator(f"xpath=.//p[.='{label.replace('_', ' ')}']/following::input[1]")
            expect(box).to_have_value(value, timeout=15_000)
        return self

    def choose(self, label, option):
        _choose(self._page, self.body, label, option)
        return self

    def tick(self, label):
        """Turns a box, a switch or a radio button on."""
        return self._turn(label, True)

    def untick(self, label):
        """Turns a box off."""
        return self._turn(label, False)

    def _turn(self, label, on):
        """Clicks until it stays as it should: a form that is being drawn anew loses a click."""
        box = self.body.locator("label", has=self._page.get_by_text(label, exact=True)).locator("input")
        for _ in range(10):
            if box.is_checked() != on:
                box.click(force=True)
            self._page.wait_for_timeout(500)
            if box.is_checked() == on:
                break
        expect(box).to_be_checked(checked=on)
        return self

    def says(self, text):
        expect(self.body.get_by_text(text).first).to_be_visible()
        return self

    @property
    def button(self):
        return self.body.get_by_role("button", name="Execute").first

    def run(self):
        expect(self.button).to_be_enabled()
        press(self.button)


def press(button):
    """Clicks; where a busy App does not come to rest for long, without waiting for that."""
    try:
        button.click(timeout=15_000)
    except sync_api.TimeoutError:
        button.dispatch_event("click")


def _choose(page, place, label, option):
    place.locator(f"xpath=.//p[.='{label}']/following::*[@role='combobox'][1]").first.click()
    page.get_by_role("option", name=option).click()


@contextmanager
def open_app(**page_options):
    """A browser, and a function that opens a page of it."""
    if BROWSER is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", _SERVE, str(port)], stdout=subprocess.DEVNULL, env=os.environ)
    try:
        _wait_for(port)
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSER, args=_FLAGS)

            def new_page(**options):
                page = browser.new_page(**{"viewport": {"width": 1280, "height": 800}, **page_options, **options})
                page.set_default_timeout(PATIENCE)
                return App(page, port)

            yield new_page
            browser.close()
    finally:
        server.terminate()
        server.wait()


def _wait_for(port):
    for _ in range(240):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise TimeoutError(f"the App did not open port {port}")
