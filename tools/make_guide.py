"""Takes the pictures of docs/guide.md: walks through the real App, in a browser, on the demo set.

Run: make guide. Everything lies in a folder, a database and a cache of its own, which go at the end.
"""

import argparse
import io
import math
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "browser")]

import conftest  # noqa: E402, F401  a plugins folder and cache of its own
import with_fiftyone  # noqa: E402, F401  and a database

# isort: split
import fiftyone as fo  # noqa: E402
from driver import open_app  # noqa: E402
from PIL import Image  # noqa: E402

from fiftyone_ecif.demo.demo import demo_model, load_demo  # noqa: E402
from fiftyone_ecif.demo.training import MODEL  # noqa: E402

PAIRS = 600
MOVING = ("start", "score-form", "scored", "pair", "threshold", "review", "learned", "traced", "edited")


class Walk:
    """A walk through the App that takes pictures.

    Args:
        app: the page.
        dataset: what it is open on.
        folder: where the pictures go.
    """

    def __init__(self, app, dataset, weights, folder):
        self.app, self.dataset, self.weights, self.folder = app, dataset, weights, folder
        zoom = app.page.locator(".MuiSlider-root").nth(1)
        zoom.click(position={"x": 0.8 * zoom.bounding_box()["width"], "y": 10})  # large enough to read captions

    def shoot(self, name):
        """Takes a picture of what is on screen, once that has not changed for a second and a half."""
        page = self.app.page
        page.mouse.move(640, 2)
        page.locator("[data-cy=looker]").first.wait_for()
        seen = [page.screenshot()]
        while (len(seen) < 60 and len(set(seen[-4:])) > 1) or len(seen) < 4:
            page.wait_for_timeout(500)
            seen.append(page.screenshot())
        picture = Image.open(io.BytesIO(seen[-1])).convert("RGB")
        picture.quantize(128).save(self.folder / f"{name}.png", optimize=True)
        print(name, flush=True)

    def score(self):
        app = self.app
        app.panel()
        self.shoot("start")
        form = app.form("Compute ECIF influence")
        form.fill(Model=MODEL, Pretrained=self.weights).tick("Fit the model to these pairs first")
        self.shoot("score-form")
        form.run()
        app.said("ECIF influence, run 'ecif'")
        app.said(f"Scored {len(self.dataset.match_tags('train')):,} pairs")
        app.sidebar("ecif_influence").wait_for()
        self.shoot("scored")

    def inspect(self):
        self.app.turn_to("Ranking")
        self.shoot("ranking")
        self.app.tick(0)
        self.app.turn_to("Pair")
        self.app.panel().get_by_text("Validation pairs it harms most").wait_for()
        self.shoot("pair")
        self.app.tick(0)
        self.app.turn_to("Run")
        self.shoot("run")
        self.app.turn_to("Overview")

    def detect(self):
        app = self.app
        form = app.form("Detect misaligned pairs")
        form.fill(Model=MODEL, Pretrained=self.weights)
        self.shoot("detect-form")
        form.run()
        app.said(re.compile(r"^Scored 600 pairs, skipped 0\. (About|How many)"))
        app.sidebar("audit_misalignment").wait_for()
        panel = app.panel()
        slider = panel.get_by_role("slider")
        track = slider.locator("xpath=ancestor::span[contains(@class, 'MuiSlider-root')]")
        track.click(position={"x": track.bounding_box()["width"] * 0.3, "y": 10})
        share = float(slider.input_value())
        panel.get_by_text(f"The most suspicious: {share:.1f} % of the pairs").wait_for()
        count = math.ceil(share / 100 * PAIRS)
        panel.get_by_text(re.compile(f"^{count} pairs, with a score of")).wait_for()
        panel.get_by_role("button", name=f"Tag {count}", exact=True).click()
        app.said("Tagged ")
        panel.get_by_role("button", name="Show", exact=True).click()
        app.wait_for_count(count)
        self.shoot("threshold")
        form = app.form("Export pairs").fill(File="~/suspects.csv")
        self.shoot("export-form")
        form.run()
        app.said("Exported ")
        app.close()

    def review(self):
        app, panel = self.app, self.app.panel()
        app.turn_to("Review")
        panel.get_by_role("button", name="Propose pairs").click()
        paths = {sample.filepath: sample for sample in self.dataset}
        for number in range(1, 21):
            panel.get_by_text(f"Pair {number} of 20. Do image and caption belong together?").wait_for()
            if number == 6:
                self.shoot("review")
            sample = paths[unquote(panel.locator("img").first.get_attribute("src")).split("filepath=")[1]]
            app.page.keyboard.press("m" if sample.spoiled else "a")
        panel.get_by_text("That was the last one.").wait_for()
        panel.get_by_role("button", name="Learn from the 20 tags").click()
        app.said("Learned from")
        app.wait_for_count(PAIRS)
        self.shoot("learned")

    def trace(self):
        app = self.app
        app.form("Trace predictions").run()
        app.said("Traced ")
        app.panel().get_by_text("Mistake 1 of 5, loss").wait_for()
        self.shoot("traced")

    def edit(self):
        app = self.app
        app.form("Tag by influence").tick("Entire dataset").fill(Pairs=50).run()
        app.said("Tagged 50 pairs 'harmful'")
        app.close()
        form = app.form("Edit model")
        form.choose("Pairs to remove", "tag: harmful").fill(Checkpoint="~/edited.pt")
        self.shoot("edit-form")
        form.run()
        app.said("Removed 50 pairs in ")
        app.panel().get_by_text("Last edit of the model").wait_for()  # the panel turns to it by itself
        self.shoot("edited")

    def manage(self):
        app = self.app
        form = app.form("Manage influence runs").choose("Run", "ecif — influence")
        self.shoot("manage")
        form.tick("Delete").choose("Run", "audit — misalignment")
        self.shoot("delete-form")
        form.tick("Yes, delete").run()
        app.said("Deleted the run 'audit', with ")
        app.close()


def animate(folder, path):
    """Makes a moving picture of some of the pictures in a folder."""
    frames = [Image.open(folder / f"{name}.png").convert("RGB").resize((960, 600), Image.LANCZOS) for name in MOVING]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=2500, loop=0, quality=60, method=6)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "guide", help="folder of the pictures")
    parser.add_argument("--size", default="1280x800", help="of the window (default: %(default)s)")
    parser.add_argument("--theme", choices=["dark", "light"], default="dark")
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    folder = options.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    dataset = load_demo(pairs=PAIRS)
    home = Path(tempfile.mkdtemp(prefix="ecif-guide-"))
    os.environ["HOME"] = str(home)
    shutil.copyfile(demo_model(dataset), home / "digits.pt")
    dataset.app_config.active_fields = fo.core.odm.ActiveFields(paths=["caption", "spoiled"])
    dataset.save()
    os.environ["FIFTYONE_APP_THEME"] = options.theme
    with open_app(viewport={"width": width, "height": height}) as new_page:
        walk = Walk(new_page().open(dataset), dataset, home / "digits.pt", folder)
        for name in ("score", "inspect", "detect", "review", "trace", "edit", "manage"):
            getattr(walk, name)()
    shutil.rmtree(home)
    animate(folder, folder / "walk.webp")


if __name__ == "__main__":
    main()
