"""Times the App on many pairs, in a browser: the panel's first plot, brushing, the slider, tracing.

Run: python tools/time_app.py. The pairs share the images and captions of a small demo set and
are scored by the library; everything lies in a folder, a database and a cache of its own, which go at the end.
"""

import argparse
import re
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "browser")]

import conftest  # noqa: E402, F401  a plugins folder and cache of its own
import with_fiftyone  # noqa: E402, F401  and a database

# isort: split
import fiftyone as fo  # noqa: E402
import fiftyone.operators as foo  # noqa: E402
from driver import PATIENCE, expect, open_app  # noqa: E402

from fiftyone_ecif import compute_influence  # noqa: E402
from fiftyone_ecif.demo.demo import demo_model, load_demo  # noqa: E402
from fiftyone_ecif.demo.training import MODEL  # noqa: E402

DISTINCT = 400
TRACE = "@ecif/fiftyone-ecif/trace_predictions"


def make(count):
    """A dataset of that many training pairs, scored as run ``ecif``."""
    demo = load_demo(pairs=DISTINCT)
    dataset = fo.Dataset("many-pairs")
    for tag, many in (("train", count), ("val", len(demo.match_tags("val")))):
        pairs = list(zip(*demo.match_tags(tag).values(["filepath", "caption"]), strict=True))
        chosen = (pairs[number % len(pairs)] for number in range(many))
        dataset.add_samples((fo.Sample(path, caption=said, tags=[tag]) for path, said in chosen), progress=False)
    compute_influence(
        dataset.match_tags("train"),
        target=dataset.match_tags("val"),
        model=MODEL,
        pretrained=demo_model(demo, progress=False),
        damping=0.1,  # the solve is quicker, and not what is timed
        num_workers=0,
        progress=False,
    )
    return dataset


class Clock:
    """Times what happens between two lines, and says it."""

    def __init__(self):
        self.start = time.perf_counter()

    def lap(self, what):
        print(f"{what}: {time.perf_counter() - self.start:.1f} s", flush=True)
        self.start = time.perf_counter()


def walk(app, dataset, count):
    """What a user does, with the time until they see what comes of it."""
    app.open(dataset)
    page = app.page
    page.wait_for_timeout(3000)
    clock = Clock()
    panel = app.panel()
    panel.locator(".bars path").first.wait_for(state="attached")
    clock.lap("first plot after the panel is opened")
    panel.locator(".gl-canvas").first.wait_for(state="attached")
    clock.lap("scatter plot after that")

    counts = page.locator("[data-cy=entry-counts]").first
    app.drag_over_histogram(0.05, 0.5)
    expect(counts).not_to_have_text(f"{count:,} samples", timeout=PATIENCE)
    clock.lap(f"dragging over the histogram, until the grid shows {counts.inner_text()}")

    slider = panel.get_by_role("slider")
    track = slider.locator("xpath=ancestor::span[contains(@class, 'MuiSlider-root')]")
    track.click(position={"x": track.bounding_box()["width"] * 0.4, "y": 10})
    share = float(slider.input_value())
    clock.start = time.perf_counter()
    panel.get_by_text(re.compile(f"harmful: {share:.1f} % of the pairs")).wait_for()
    clock.lap(
        f"moving the slider to {share:.1f} %, until the panel says {panel.get_by_text(' pairs, with').inner_text()}"
    )

    app.turn_to("Ranking")
    panel.get_by_text(f"of {count:,}").wait_for()
    clock.lap("ranking page")
    clock.start = time.perf_counter()
    panel.get_by_role("button", name="Look").first.click()
    panel.get_by_text("Scored pairs with the most similar image").wait_for()
    clock.lap("a pair in depth")

    form = app.form("Trace predictions")
    expect(form.button).to_be_enabled()
    clock.lap("form to trace predictions")
    form.button.click()
    app.said("Traced 5 validation pairs")
    clock.lap("trace_predictions of the 5 worst mistakes, in the App")


def trace(dataset):
    """Times the operator without the App."""
    clock = Clock()
    for number in ("first", "second"):
        selected = dataset.match_tags("val").limit(2)
        clock.start = time.perf_counter()
        foo.get_operator(TRACE)(dataset, queries=selected, count=5)
        clock.lap(f"trace_predictions of 2 selected samples, {number} time, from Python")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100_000, help="how many (default: %(default)s)")
    count = parser.parse_args().pairs
    clock = Clock()
    dataset = make(count)
    clock.lap(f"making and scoring {count:,} pairs")
    trace(dataset)
    with open_app() as new_page:
        walk(new_page(), dataset, count)


if __name__ == "__main__":
    main()
