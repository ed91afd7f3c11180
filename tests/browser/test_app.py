"""The journeys of a user through the real App, in a real browser: what they click, and what they then see."""

import csv
import math
import re
from urllib.parse import unquote

import fiftyone as fo
import open_clip
import pytest
from driver import PATIENCE, Form, expect, open_app, press

from fiftyone_ecif import compute_misalignment
from fiftyone_ecif.api.tracing import trace
from fiftyone_ecif.demo.training import MODEL


@pytest.fixture(scope="module")
def browser():
    """The App and a browser, for all journeys."""
    with open_app() as new_page:
        yield new_page


@pytest.fixture
def app(browser, dataset):
    """A page on the training pairs of a fresh copy of the small demo set."""
    dataset.app_config.active_fields = fo.core.odm.ActiveFields(paths=["caption", "spoiled"])
    dataset.save()
    app = browser()
    yield app
    app.page.close()


@pytest.fixture
def scored(dataset, score):
    """The same, scored as run ``ecif``."""
    return score(dataset.match_tags("train"), dataset.match_tags("val"), fit=True)


@pytest.fixture
def audited(dataset, made):
    """The same, with misaligned pairs looked for as run ``audit``."""
    train = dataset.match_tags("train")
    return compute_misalignment(train, model=MODEL, pretrained=made[1], num_workers=0, batch_size=24)


def counts(dataset):
    return len(dataset.match_tags("train")), len(dataset.match_tags("val"))


def test_score_sort_inspect(app, dataset, made):
    train, val = counts(dataset)
    app.open(dataset)
    form = app.form("Compute ECIF influence")
    form.says(f"{train:,} pairs will be scored towards {val:,} validation pairs")
    expect(form.button).to_be_disabled()  # no weights are given yet
    form.fill(Pretrained="no/such/model.pt").says("There is no file no/such/model.pt")
    form.fill(Model=MODEL, Pretrained=made[1]).tick("Fit the model to these pairs first").run()
    app.said("Running in the background. The Influence panel shows how far it is")
    app.said("ECIF influence, run 'ecif'")  # the panel, with the job
    app.said(f"Scored {train:,} pairs, skipped 0. The most harmful come first")
    app.sidebar("ecif_influence").wait_for()

    dataset.reload()
    order = dataset.exists("ecif_influence").sort_by("ecif_influence")
    captions = order.values("caption")
    expected = [(caption, f"{rank}") for rank, caption in enumerate(captions, 1)]
    shown = app.thumbnails(expected, "caption", "ecif_rank")
    assert len(shown) >= 6
    assert shown == expected[: len(shown)]

    app.tick(1)
    app.turn_to("Pair")
    panel = app.panel()
    expect(panel.get_by_text(captions[1], exact=True).first).to_be_visible()
    second = order.skip(1).first()
    for text in (f"{second.ecif_influence:.4g}", "no. 2 from the lowest", "Validation pairs it harms most"):
        expect(panel.get_by_text(text).first).to_be_visible()


def test_a_drag_over_the_histogram_shows_those_pairs(app, dataset, scored):
    app.open(dataset)
    app.panel().locator(".nsewdrag").first.wait_for()
    ranked = dataset.exists("ecif_influence").sort_by("ecif_influence").values("caption")
    counts = app.page.locator("[data-cy=entry-counts]").first
    before = counts.inner_text()
    app.drag_over_histogram(0.003, 0.6)
    expect(counts).not_to_have_text(before)
    shown = app.thumbnails(ranked, "caption")
    assert len(shown) >= 3
    assert shown == ranked[: len(shown)]


def test_a_lasso_around_points_shows_those_pairs_and_stays(app, dataset, scored):
    train, _ = counts(dataset)
    app.open(dataset)
    panel = app.panel()
    app.choose("Against", "ecif_positive")
    panel.locator(".gl-canvas").first.wait_for(state="attached")
    said = app.page.locator("[data-cy=entry-counts]").first
    app.lasso(0.003, 0.6)
    expect(said).not_to_have_text(f"{train} samples")
    shown = app.thumbnails(dataset.exists("ecif_influence").sort_by("ecif_influence").values("caption"), "caption")
    assert shown
    count = int(said.inner_text().split()[0])
    assert 0 < count < train
    faded = "plot => plot.data.some(trace => trace.selectedpoints?.length == COUNT)".replace("COUNT", str(count))
    app.page.wait_for_timeout(3000)  # the panel has been drawn anew
    assert panel.locator(".js-plotly-plot").nth(1).evaluate(faded)


def assert_at_rest(app):
    """The panel does not talk to itself for ever: after a while it only looks for jobs."""
    app.page.wait_for_timeout(4000)
    with_choice = []
    app.page.on("request", lambda asked: "choose_" in (asked.post_data or "") and with_choice.append(asked))
    app.page.wait_for_timeout(4000)
    assert not with_choice


def test_detect_threshold_tag_export(app, dataset, scored, made, tmp_path):
    train, _ = counts(dataset)
    app.open(dataset)
    app.panel().get_by_role("combobox").filter(has_text="ecif: influence").wait_for()
    form = app.form("Detect misaligned pairs").says(f"{train:,} pairs will be scored")
    form.fill(Model=MODEL, Pretrained=made[1]).run()
    assert "captions are wrong" in app.said(f"Scored {train:,} pairs, skipped 0")
    app.sidebar("audit_misalignment").wait_for()

    panel = app.panel()
    panel.get_by_role("combobox").filter(has_text="audit: misalignment").wait_for()
    assert_at_rest(app)
    slider = panel.get_by_role("slider")
    track = slider.locator("xpath=ancestor::span[contains(@class, 'MuiSlider-root')]")
    track.click(position={"x": track.bounding_box()["width"] * 0.6, "y": 10})
    share = float(slider.input_value())
    assert 25 < share < 35
    expect(panel.get_by_text(f"The most suspicious: {share:.1f} % of the pairs")).to_be_visible()
    count = math.ceil(share / 100 * train)
    said = re.compile(rf"^{count} pairs, with a score of 0\.\d+ and above$")
    expect(panel.get_by_text(said)).to_be_visible()
    panel.get_by_role("button", name=f"Tag {count}", exact=True).click()
    app.said(f"Tagged {count} pairs 'suspect'")
    dataset.reload()
    order = dataset.exists("audit_misalignment").sort_by("audit_misalignment", reverse=True)
    suspects = order.limit(count)
    assert set(dataset.match_tags("suspect").values("id")) == set(suspects.values("id"))
    panel.get_by_role("button", name="Show", exact=True).click()
    app.wait_for_count(count)
    captions = suspects.values("caption")
    shown = app.thumbnails(captions, "caption")
    assert shown
    assert shown == captions[: len(shown)]

    path = tmp_path / "suspects.csv"
    app.form("Export pairs").says(f"{count} pairs will be exported").fill(File=path).run()
    app.said(f"Exported {count} pairs to {path}")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == suspects.values("id")
    assert [row["caption"] for row in rows] == captions
    assert all("suspect" in row["tags"] for row in rows)


def test_review_with_keys_and_refit(app, dataset, audited):
    app.open(dataset)
    panel = app.panel()
    app.turn_to("Review")
    panel.get_by_text("So far 0 pairs are tagged aligned and 0 misaligned").wait_for()
    expect(
        panel.get_by_role("button", name="Learn once there are 2 more aligned and 2 more misaligned")
    ).to_be_disabled()
    app.page.keyboard.press("Enter")  # "Propose pairs (Enter)"
    panel.get_by_text("Pair 1 of 20.").wait_for()
    wrong = {sample.id for sample in dataset if sample.spoiled}
    pairs = {path: sample for path, sample in zip(*dataset.values(["filepath", "id"]), strict=True)}
    said = {}
    for number in range(1, 21):
        question = panel.get_by_text(f"Pair {number} of 20. Do image and caption belong together?")
        expect(question).to_be_visible()
        picture = panel.locator("img").first
        sample = pairs[unquote(picture.get_attribute("src")).split("filepath=")[1]]
        expect(panel.get_by_text(dataset[sample].caption, exact=True).first).to_be_visible()
        tag = said[sample] = "Misaligned" if sample in wrong else "Aligned"
        app.page.keyboard.press(tag[0].lower())
        if number == 1:
            app.page.keyboard.press("m" if tag == "Aligned" else "a")  # too early to be about the next pair
            panel.get_by_text("Pair 2 of 20.").wait_for()
            dataset.reload()
            assert tag.lower() in dataset[sample].tags
            app.page.keyboard.press("ArrowLeft")  # back, and once more
            expect(question).to_be_visible()
            app.page.keyboard.press("ArrowRight")  # skipped
            said.clear()
        if min(list(said.values()).count(one) for one in ("Misaligned", "Aligned")) >= 2 and number >= 8:
            break
    misaligned = list(said.values()).count("Misaligned")
    text = f"So far {len(said) - misaligned} pairs are tagged aligned and {misaligned} misaligned"
    expect(panel.get_by_text(text)).to_be_visible()
    for sample, tag in said.items():
        assert tag.lower() in dataset[sample].tags

    panel.get_by_role("button", name=f"Learn from the {len(said)} tags").click()
    app.said(f"Learning from {len(said)} tags")
    learned = app.said("Learned from")
    assert f"Learned from {len(said) - misaligned} aligned and {misaligned} misaligned pairs" in learned
    assert "AUROC" in learned
    dataset.reload()
    captions = dataset.exists("audit_misalignment").sort_by("audit_misalignment", reverse=True).values("caption")
    shown = app.thumbnails(captions, "caption")
    assert len(shown) >= 6
    assert shown == captions[: len(shown)]


def test_the_slider_keeps_every_press_of_a_key(app, dataset, audited):
    app.open(dataset)
    slider = app.panel().get_by_role("slider")
    before = float(slider.input_value())
    slider.focus()
    for _ in range(10):
        app.page.keyboard.press("ArrowRight")
    expect(slider).to_have_value(f"{before + 5:g}")
    expect(app.panel().get_by_text(f"The most suspicious: {before + 5:.1f} % of the pairs")).to_be_visible()


def test_select_mistakes_trace(app, dataset, scored):
    app.open(dataset, "val")
    for number in (0, 2):
        app.tick(number)
    chosen = dataset.match_tags("val").values(["id", "caption"])
    chosen_ids, captions = ([values[0], values[2]] for values in chosen)
    app.form("Trace predictions").says("The 2 selected samples").run()
    app.said("Traced 2 validation pairs: ")
    panel = app.page.locator("[data-cy=panel-content-influence_panel]")  # which opens by itself
    panel.get_by_text("Mistake 1 of 2, loss").or_(panel.get_by_text("Validation pair 1 of 2, loss")).wait_for()
    dataset.reload()
    traces = trace(scored, chosen_ids, 5, progress=False)
    order = list(dict.fromkeys(i for one in traces for i in (one.id, *(p.id for p in (*one.culprits, *one.helpers)))))
    view = dataset.select(order, ordered=True)
    expected = list(zip(*view.values(["caption", "ecif_trace"]), strict=True))
    assert expected[0][0] in captions
    worst = traces[0]
    assert worst.retrieved
    for one in (worst, *worst.culprits, *worst.helpers):
        expect(panel.locator(f"img[alt='{dataset[one.id].caption}']").first).to_be_visible()
    for match in worst.retrieved:
        expect(panel.locator(f"img[alt='{dataset[match.found].caption}']").first).to_be_visible()
        said = f"similarity {match.similarity:.3f}, the right one {match.right_similarity:.3f}"
        expect(panel.get_by_text(f"its {match.kind}, for the").first).to_contain_text(said)
    press(panel.get_by_role("button", name="Next", exact=True))
    panel.get_by_text("2 of 2, loss").wait_for()
    app.page.reload()  # what was traced can be looked at again
    app.turn_to("Trace")
    panel.get_by_text("of 2, loss").wait_for()
    press(panel.get_by_role("button", name="Previous", exact=True))
    panel.get_by_text("1 of 2, loss").wait_for()
    expect(panel.locator(f"img[alt='{dataset[worst.culprits[0].id].caption}']").first).to_be_visible()
    shown = app.thumbnails(expected, "caption", "ecif_trace")
    assert len(shown) >= 6
    assert shown == expected[: len(shown)]
    assert "loss" in shown[0][1]
    assert all(what.startswith("harms") for _, what in shown[1:6])


def test_tag_edit_model(app, dataset, scored, tmp_path):
    app.open(dataset)
    app.form("Tag by influence").fill(Pairs=6).says("6 pairs will be tagged").run()
    app.said("Tagged 6 pairs 'harmful'")
    app.wait_for_count(6)
    app.page.keyboard.press("Escape")
    path = tmp_path / "edited.pt"
    form = app.form("Edit model")
    form.choose("Pairs to remove", "tag: harmful").says("6 of the 72 pairs of run 'ecif' will be removed")
    form.fill(Checkpoint=path).run()
    said = app.said("Removed 6 pairs in ")
    losses = re.search(r"Target loss (\S+) before, (\S+) predicted, (\S+) measured after", said)
    before, predicted, after = map(float, losses.groups())
    assert before > predicted
    assert before > after  # harmful pairs are gone
    model = open_clip.create_model(MODEL, pretrained=str(path))
    assert sum(p.numel() for p in model.parameters()) > 0
    app.close()
    panel = app.panel()
    app.turn_to("Run")
    expect(panel.get_by_text("Last edit of the model").first).to_be_visible()
    expect(panel.get_by_text(said, exact=True).first).to_be_visible()


def test_a_renamed_run_is_followed_and_a_deleted_one_leaves_the_grid_full(app, dataset, scored):
    train, _ = counts(dataset)
    app.open(dataset)
    panel = app.panel()
    panel.get_by_role("combobox").filter(has_text="ecif: influence").wait_for()
    panel.get_by_role("button", name="Show", exact=True).click()
    ranked = dataset.exists("ecif_influence").sort_by("ecif_influence").values("caption")
    count = math.ceil(0.05 * train)
    app.wait_for_count(count)
    app.form("Manage influence runs").tick("Rename").fill(New_key="better").run()
    app.said("The run 'ecif' is now 'better'")
    app.close()
    panel.get_by_role("combobox").filter(has_text="better: influence").wait_for()
    app.wait_for_count(count)
    expected = [(caption, f"{rank}") for rank, caption in enumerate(ranked[:count], 1)]
    assert app.thumbnails(expected, "caption", "better_rank") == expected
    panel.get_by_role("button", name="Back to the ranking").click()
    app.wait_for_count(train)
    app.form("Manage influence runs").tick("Delete").tick("Yes, delete").run()
    app.said("Deleted the run 'better', with ")
    app.close()
    app.wait_for_count(len(dataset))
    expect(panel.get_by_text("No scores yet")).to_be_visible()


def test_a_failure_stays_with_its_remedy_and_the_form_remembers(app, dataset, made):
    app.open(dataset)
    app.form("Compute ECIF influence").fill(Model="ViT-B-32", Pretrained=f" '{made[1]}' ").run()
    panel = app.panel()
    panel.get_by_text("ECIF influence, run 'ecif' came to nothing").wait_for()
    app.page.reload()
    panel.get_by_text("ECIF influence, run 'ecif' came to nothing").wait_for()
    panel.get_by_role("button", name="Open the form again").click()
    Form(app.page).holds(Model="ViT-B-32", Pretrained=f" '{made[1]}' ").fill(Model=MODEL).run()
    panel.get_by_text("ECIF influence, run 'ecif' is done").wait_for()
    panel.get_by_role("button", name="Dismiss").click()
    expect(panel.get_by_text("is done")).to_have_count(0)
    panel.get_by_role("button", name="New run").click()
    panel.get_by_role("button", name="Compute ECIF influence").click()
    Form(app.page).holds(Model=MODEL, Key="ecif2")


def test_the_slice_that_is_shown_is_scored(browser, grouped, made):
    app = browser()
    app.page.goto(f"http://127.0.0.1:{app.port}/datasets/{grouped.name}")
    app.wait_for_count(192)
    app.page.keyboard.press("Escape")
    form = app.form("Compute ECIF influence").says("72 pairs will be scored towards 24 validation pairs")
    form.fill(Model=MODEL, Pretrained=made[1]).run()
    app.said("Scored 72 pairs, skipped 0")
    grouped.reload()
    assert grouped.select_group_slices("left").count("ecif_influence") == 72
    assert grouped.select_group_slices("right").count("ecif_influence") == 0
    app.page.close()


def test_delete_a_run(app, dataset, scored, audited):
    app.open(dataset)
    panel = app.panel()
    panel.get_by_role("combobox").filter(has_text="audit: misalignment").wait_for()
    app.sidebar("audit_misalignment").wait_for()
    form = app.form("Manage influence runs").tick("Delete").choose("Run", "audit")
    form.says("The run will be deleted, with ")
    expect(form.button).to_be_disabled()
    form.tick("Yes, delete").run()
    app.said("Deleted the run 'audit', with ")
    for field in ("audit_misalignment", "audit_reason", "audit_duplicate"):
        expect(app.sidebar(field)).to_have_count(0)
    expect(app.sidebar("ecif_influence")).to_be_visible()
    app.close()
    expect(panel.get_by_role("combobox").filter(has_text="ecif: influence")).to_be_visible()
    dataset.reload()
    assert dataset.list_brain_runs() == ["ecif"]


def test_stop_and_run_again(app, dataset, made):
    train, _ = counts(dataset)
    app.open(dataset)

    def score(partitions):
        form = app.form("Compute ECIF influence").fill(Model=MODEL, Pretrained=made[1])
        form.tick("Advanced settings").fill(Partitions=partitions).run()

    score(20_000)
    stop = app.panel().get_by_role("button", name="Stop")
    expect(app.panel().get_by_text(re.compile("Scoring|Computing gradients|Fitting|Solving")).first).to_be_visible(
        timeout=PATIENCE
    )
    stop.click()
    app.said("Stopped. What was computed so far is kept")
    expect(stop).to_have_count(0)
    dataset.reload()
    assert dataset.list_brain_runs() == []
    assert not [field for field in dataset.get_field_schema() if field.startswith("ecif")]
    expect(app.sidebar("ecif_influence")).to_have_count(0)

    score(1)
    app.said(f"Scored {train:,} pairs, skipped 0")
    app.sidebar("ecif_influence").wait_for()
