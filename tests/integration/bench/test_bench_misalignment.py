"""The misalignment benchmark: its data, its noise, its figures."""

import csv
import json
from collections import Counter

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.metrics import f1_score, roc_auc_score

from fiftyone_ecif import EcifError
from fiftyone_ecif.bench.misalignment import defaults
from fiftyone_ecif.bench.misalignment import experiments as misalignment
from fiftyone_ecif.bench.misalignment.experiments import Sizes, measure, summarise
from fiftyone_ecif.bench.misalignment.pairs import CleanPairs, load_pairs, read_folder, swap_captions
from fiftyone_ecif.cli.main import main
from fiftyone_ecif.demo import scenes

SMALL = Sizes(
    pairs=80, ratios=(0.3,), seeds=2, steps=20, labels=(10, 20), drops=(0.0,), retrained=1, ablations=1, draws=20
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of clean pairs as a stranger would bring it."""
    place = tmp_path_factory.mktemp("set")
    rows = []
    for number, pair in enumerate(scenes.make_pairs(140, noise=0.0, seed=5, validation=0)):
        Image.fromarray(pair.image).save(place / f"{number}.png")
        rows.append({"filepath": f"{number}.png", "caption": pair.caption, "group": str(number // 2)})
    write(place, rows)
    return place


def write(place, rows):
    with (place / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


KEPT = []  # what the command would leave if it were stopped, model by model


@pytest.fixture(scope="module")
def ran(folder, tmp_path_factory):
    """The command on that folder, and where it wrote."""
    out = tmp_path_factory.mktemp("out")
    run = misalignment.run

    def watched(*given):
        return run(*given[:-1], lambda found: (given[-1](found), KEPT.append(json.loads(json.dumps(found)))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(misalignment, "QUICK", SMALL)
        patch.setattr(misalignment, "run", watched)
        arguments = ["bench", "misalignment", "--data", str(folder), "--quick", "--json", "--out", str(out)]
        return CliRunner().invoke(main, arguments), out


@pytest.fixture(scope="module")
def result(ran):
    assert ran[0].exit_code == 0, ran[0].output
    return json.loads(ran[0].stdout)


def toy(captions, category=None):
    kinds = {"category": category} if category else {}
    names = [str(number) for number in range(len(captions))]
    return CleanPairs("toy", names, list(captions), kinds, names)


def test_swapping_permutes_captions_and_says_which_are_wrong():
    pairs = toy([f"caption {number}" for number in range(100)])
    captions, wrong = swap_captions(pairs, "random", 0.3, seed=1)
    assert sorted(captions) == sorted(pairs.captions)
    assert wrong.sum() == 30
    assert [a != b for a, b in zip(captions, pairs.captions, strict=True)] == wrong.tolist()
    assert swap_captions(pairs, "random", 0.3, seed=1)[0] == captions
    assert swap_captions(pairs, "random", 0.3, seed=2)[0] != captions


def test_swapping_within_a_category_stays_there():
    category = [str(number % 7) for number in range(140)]
    pairs = toy([f"{kind} {number}" for number, kind in enumerate(category)], category)
    captions, wrong = swap_captions(pairs, "category", 0.5, seed=0)
    assert wrong.sum() >= 60
    assert [caption.split()[0] for caption in captions] == category


def test_a_victim_that_gets_its_own_text_again_is_not_wrong():
    pairs = toy(["a cat", "a dog"] * 50)
    captions, wrong = swap_captions(pairs, "random", 0.4, seed=0)
    assert 0 < wrong.sum() <= 40
    assert [a != b for a, b in zip(captions, pairs.captions, strict=True)] == wrong.tolist()
    assert not swap_captions(toy(["a cat"] * 20), "random", 0.4, seed=0)[1].any()


def test_permuted_captions_leave_no_duplicates_to_count(result):
    assert all(row["duplicate_count_auroc"] == 0.5 for row in result["noise_rates"])


def test_figures_are_those_of_sklearn():
    generator = np.random.default_rng(0)
    wrong = generator.random(300) < 0.3
    scores = wrong + generator.normal(size=300)
    found = measure(wrong, scores)
    top = np.zeros(300, dtype=bool)
    top[np.argsort(-scores)[: wrong.sum()]] = True
    assert found["auroc"] == pytest.approx(roc_auc_score(wrong, scores))
    assert found["auroc"] == pytest.approx(misalignment._auroc(wrong, scores))
    assert found["f1"] == pytest.approx(f1_score(wrong, top))
    best_30 = np.argsort(-scores)[:30]
    assert found["recall_at_budget"]["0.1"] == pytest.approx(wrong[best_30].sum() / wrong.sum())
    assert found["p_at_10"] == pytest.approx(wrong[np.argsort(-scores)[:10]].mean())


def test_the_bootstrap_knows_a_difference_from_none():
    generator = np.random.default_rng(0)
    wrong = generator.random(400) < 0.3
    weak = wrong + 2 * generator.normal(size=400)
    strong = wrong + 0.5 * generator.normal(size=400)
    rows = {
        row["detector"]: row
        for row in summarise(
            {}, [(wrong, {"clip_score": weak, "calibrated": strong, "neighbour_influence": weak})], 200
        )
    }
    assert rows["calibrated"]["difference_low"] > 0
    assert rows["calibrated"]["best_baseline"] == "clip_score"
    assert rows["neighbour_influence"]["difference"] == rows["neighbour_influence"]["difference_high"] == 0
    assert rows["calibrated"]["difference"] == pytest.approx(rows["calibrated"]["auroc"] - rows["clip_score"]["auroc"])


def test_a_run_has_a_row_for_each_detector_noise_and_seed(result):
    cells = {(row["noise"], row["seed"]) for row in result["rows"]}
    assert cells == {("random", 0), ("random", 1)}
    each = [row["detector"] for row in result["rows"] if (row["noise"], row["seed"]) == ("random", 0)]
    assert {"calibrated", "neighbour_influence", "global_influence", "lemon_tuned", *misalignment.BASELINES} <= set(
        each
    )
    assert all(0 <= row[name] <= 1 for row in result["rows"] for name in ("auroc", "auprc", "f1", "p_at_10"))
    tuned = {key: row["auroc"] for row in result["rows"] if row["detector"] == "lemon_tuned" for key in [cell(row)]}
    fixed = {key: row["auroc"] for row in result["rows"] if row["detector"] == "lemon" for key in [cell(row)]}
    assert all(tuned[key] >= fixed[key] - 1e-6 for key in fixed)


def cell(row):
    return row["noise"], row["ratio"], row["seed"]


def test_pairs_of_a_group_stay_on_one_side(folder, monkeypatch):
    inside = []
    monkeypatch.setattr(misalignment, "swap_captions", lambda pairs, *_: inside.extend(pairs.groups) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        misalignment.spoil_and_train(load_pairs(str(folder)), "random", 0.3, 0, SMALL, misalignment.SCRATCH)
    assert set(Counter(inside).values()) == {2}
    assert len(inside) == 140 - 2 * round(0.15 * 70)


def test_what_a_stopped_run_leaves_is_summed_up_seed_by_seed(result):
    assert [len(kept["review"]) > 0 for kept in KEPT] == [True] * 4  # after each model, and after each seed
    assert [{row["seeds"] for row in kept["summary"]} for kept in KEPT] == [set(), {1}, {1}, {2}]
    assert KEPT[-1] == result


def test_every_run_says_its_rate_and_how_far_it_is_off(result):
    assert {(row["noise"], row["ratio"]) for row in result["noise_rates"]} == {("none", 0.0), ("random", 0.3)}
    for row in result["noise_rates"]:
        assert row["covered"] == (row["low"] <= row["wrong"] <= row["high"])
        assert 0 <= row["calibration_error"] <= 1
        assert 0 <= row["power_subtle"] <= 1


def test_calibration_is_judged_by_tenths():
    said = np.array([0.05, 0.05, 0.05, 0.05, 0.95, 0.95])
    wrong = np.array([False, False, False, True, True, True])
    first, last = misalignment.reliability(said, wrong)
    assert first == {"from": 0.0, "pairs": 4, "said": pytest.approx(0.05), "wrong": 0.25}
    assert last == {"from": 0.9, "pairs": 2, "said": pytest.approx(0.95), "wrong": 1.0}
    found = misalignment.expected_calibration_error(said, wrong)
    assert found == pytest.approx((4 * 0.2 + 2 * 0.05) / 6)


def test_only_the_noise_that_is_asked_for_and_possible(monkeypatch):
    made = []
    monkeypatch.setattr(misalignment, "spoil_and_train", lambda data, noise, *rest: made.append(noise) or 1 / 0)
    pairs = toy(["a cat", "a dog"] * 50, ["cat", "dog"] * 50)
    with pytest.raises(ZeroDivisionError):
        misalignment.run(pairs, SMALL, noises=("category",))
    assert made == ["category"]
    with pytest.raises(EcifError, match="noise='subcategory' cannot be made of toy, which allows random, category"):
        misalignment.run(pairs, SMALL, noises=("subcategory",))


def test_numbers_of_the_default_are_tried_one_by_one_and_put_back(folder, monkeypatch):
    trained = misalignment.spoil_and_train(load_pairs(str(folder)), "random", 0.3, 0, SMALL, misalignment.SCRATCH)
    monkeypatch.setattr(defaults, "spoil_and_train", lambda *_: trained)
    tried = defaults.JUDGING | defaults.GATHERING
    before = {(module, name): getattr(module, name) for module, name in tried}
    rows = defaults.run(str(folder), "scratch", 1)
    assert len(rows) == 1 + sum(map(len, tried.values()))
    assert (rows[0]["number"], rows[0]["value"]) == ("all", "as they are")
    for module, name in tried:
        assert getattr(module, name) is before[module, name]
        of_it = [row for row in rows if row["number"] == f"{module.__name__.rsplit('.', 1)[1]}.{name}"]
        assert len(of_it) == len(tried[module, name])
        assert any(row["auroc"] != rows[0]["auroc"] or row["covered"] != rows[0]["covered"]
                   or row["calibration_error"] != rows[0]["calibration_error"] for row in of_it)  # fmt: skip


def test_seeds_differ_in_noise_and_training(result):
    scores = {
        row["seed"]: row["auroc"] for row in result["rows"] if (row["noise"], row["detector"]) == ("random", "loss")
    }
    assert scores[0] != scores[1]


def test_dropping_nothing_is_the_same_for_everyone(result):
    kept = [row for row in result["downstream"] if row["dropped"] == 0 and cell(row) == ("random", 0.3, 0)]
    assert len({row["recall_at_5"] for row in kept}) == 1
    assert {row["by"] for row in kept} == {"calibrated", "clip_score", "lemon_z", "random", "oracle"}


def test_the_command_prints_and_writes_the_same(ran, result):
    out = ran[1]
    assert {"data", "noise", "ratio", "seed", "detector", "auroc", "recall_at_budget"} <= set(result["rows"][0])
    assert {"auroc_sd", "detector"} <= set(result["summary"][0])
    assert json.loads((out / "result.json").read_text()) == result
    assert "| calibrated |" in (out / "report.md").read_text()
    assert len([path for path in out.glob("*.png") if path.stat().st_size > 5000]) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filepath": "gone.png"}, "line 3: there is no file 'gone.png'"),
        ({"filepath": "../../secret.png"}, "line 3: there is no file"),
        ({"caption": "  "}, "line 3: the caption is empty"),
    ],
)
def test_a_bad_row_is_named(folder, tmp_path, change, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"filepath": "a.png", "caption": "one"}, {"filepath": "a.png", "caption": "two"} | change]
    write(tmp_path, rows)
    with pytest.raises(EcifError, match=message):
        read_folder(tmp_path, "bad")


def test_a_folder_without_a_table_or_a_column_is_refused(tmp_path):
    with pytest.raises(EcifError, match=r"pairs\.csv cannot be read"):
        load_pairs(str(tmp_path))
    write(tmp_path, [{"filepath": "a.png"}])
    with pytest.raises(EcifError, match="no column 'caption'"):
        load_pairs(str(tmp_path))
    with pytest.raises(EcifError, match="neither a folder nor one of digits"):
        load_pairs("coco")


def test_the_demo_scenes_are_a_clean_set(monkeypatch):
    pairs = load_pairs("digits")
    assert len(pairs.captions) == len(set(pairs.captions)) == 2000
    assert set(pairs.kinds["category"]) == set(scenes.RELATIONS)
    assert len(set(pairs.kinds["subcategory"])) == 40
