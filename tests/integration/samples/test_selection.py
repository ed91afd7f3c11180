"""Selecting, tagging and exporting by score."""

import csv
import json

import fiftyone as fo
import pytest

from fiftyone_ecif import EcifError, export_pairs, select_by_influence, tag_by_influence
from fiftyone_ecif.samples.selection import whole_pairs

SCORES = [0.5, -2.0, None, 3.0, -1.0, 0.0]


@pytest.fixture
def scored(tmp_path):
    dataset = fo.Dataset()
    dataset.add_samples(
        [
            fo.Sample(filepath=str(tmp_path / f"{n}.png"), caption=caption, ecif_influence=score)
            for n, (score, caption) in enumerate(zip(SCORES, ["=1+1", 'ünï, "code"', "c", "d", "e", "f"], strict=True))
        ],
        progress=False,
    )
    yield dataset
    dataset.delete()


@pytest.mark.parametrize(
    ("direction", "limit", "expected"),
    [
        ("harmful", {"count": 2}, [-2.0, -1.0]),
        ("valuable", {"count": 2}, [3.0, 0.5]),
        ("harmful", {"count": 99}, [-2.0, -1.0]),
        ("harmful", {"share": 0.21}, [-2.0, -1.0]),
        ("valuable", {"share": 1.0}, [3.0, 0.5]),
        ("harmful", {"threshold": 0.0}, [-2.0, -1.0]),
        ("harmful", {"threshold": 1.0}, [-2.0, -1.0]),
        ("suspicious", {"count": 4}, [3.0, 0.5, 0.0, -1.0]),
        ("valuable", {"threshold": 0.0}, [3.0, 0.5]),
    ],
)
def test_selecting_never_takes_unscored_samples(scored, direction, limit, expected):
    assert select_by_influence(scored, "ecif_influence", direction, **limit).values("ecif_influence") == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give one of count, share and threshold, got none"),
        ({"count": 1, "share": 0.5}, "got count, share"),
        ({"count": 0}, "at least 1"),
        ({"share": 1.5}, "share=1.5"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"count": 1, "direction": "bad"}, "direction='bad'"),
        ({"count": 1, "field": "caption"}, "no score field 'caption'. Score fields: ecif_influence"),
    ],
)
def test_bad_selections(scored, options, message):
    with pytest.raises(EcifError, match=message):
        select_by_influence(scored, **({"field": "ecif_influence"} | options))


def test_a_share_is_rounded_up_to_whole_pairs():
    assert [whole_pairs(share / 100, 100) for share in range(101)] == list(range(101))
    assert whole_pairs(0.101, 10) == 2
    assert whole_pairs(1e-9, 10) == 1


def test_a_share_of_nothing_is_said(scored):
    nothing = scored.exists("ecif_influence", False)
    with pytest.raises(EcifError, match="None of these samples has a score in 'ecif_influence'"):
        select_by_influence(nothing, "ecif_influence", share=0.1)


def test_a_score_does_not_speak_for_a_person(scored):
    with pytest.raises(EcifError, match="'aligned' is reserved"):
        tag_by_influence(scored, tag="aligned", count=1)
    assert not scored.match_tags("aligned")


def test_tagging_twice_is_tagging_once_and_can_be_taken_back(scored):
    for _ in range(2):
        view = tag_by_influence(scored, count=2)
    assert view.values("ecif_influence") == [-2.0, -1.0]
    assert scored.count_sample_tags() == {"harmful": 2}
    view.untag_samples("harmful")
    assert scored.count_sample_tags() == {}


def test_tagging_a_view_that_the_tag_ends(scored):
    view = tag_by_influence(scored.match_tags("seen", bool=False), tag="seen", count=2)
    assert len(view) == 2


def test_csv_keeps_order_and_is_no_formula(scored, tmp_path):
    path = tmp_path / "deep" / "pairs.csv"
    assert export_pairs(scored.sort_by("ecif_influence", reverse=True), path) == 6
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["ecif_influence"] for row in rows] == ["3.0", "0.5", "0.0", "-1.0", "-2.0", ""]
    assert rows[1]["caption"] == "'=1+1"
    assert rows[4]["caption"] == 'ünï, "code"'
    assert rows[0]["id"] == scored.match(fo.ViewField("ecif_influence") == 3.0).first().id


@pytest.mark.parametrize("start", [*"=+-@\t\r\n\0", *"\uff1d\uff0b\uff0d\uff20", " =", "\u00a0+"])
def test_no_cell_is_a_formula(start, scored, tmp_path):
    text = f"{start}HYPERLINK(1);=2"
    sample = scored.first()
    sample.caption, sample.tags = text, [text, "b"]
    sample.save()
    path = tmp_path / "pairs.csv"
    export_pairs(scored.limit(1), path)
    with path.open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["caption"] == f"'{text}"
    assert row["tags"] == f"'{text};b"
    assert f'"\'{text}"' in path.read_bytes().decode()  # quoted, as some split cells at semicolons


def test_json_is_exact(scored, tmp_path):
    path = tmp_path / "pairs.json"
    export_pairs(scored, path, fields=["ecif_influence"])
    rows = json.loads(path.read_text())
    assert [row["ecif_influence"] for row in rows] == SCORES
    assert rows[0]["caption"] == "=1+1"
    assert set(rows[0]) == {"id", "filepath", "caption", "tags", "ecif_influence"}


def test_what_runs_say_beside_scores_is_exported(scored, tmp_path):
    for name, kind, value in (
        ("ecif_rank", fo.IntField, 3),
        ("audit_misalignment", fo.FloatField, 0.5),
        ("audit_reason", fo.StringField, "a reason"),
        ("audit_duplicate", fo.StringField, None),
        ("mine_reason", fo.StringField, "mine"),
    ):
        scored.add_sample_field(name, kind)
        scored.set_values(name, [value] * len(scored))
    path = tmp_path / "pairs.json"
    export_pairs(scored, path)
    row = json.loads(path.read_text())[0]
    assert row["ecif_rank"] == 3
    assert row["audit_reason"] == "a reason"
    assert "audit_duplicate" in row
    assert "mine_reason" not in row


def test_bad_exports(scored, tmp_path):
    taken = tmp_path / "taken.csv"
    taken.write_text("mine")
    for path, options, message in (
        (tmp_path / "pairs.xls", {}, "must end in .csv or .json"),
        (taken, {}, "already"),
        (taken / "below.csv", {}, "cannot be written"),
        (tmp_path / "pairs.csv", {"fields": ["nope"]}, "no field 'nope'"),
        (tmp_path / "pairs.csv", {"caption_field": "nope"}, "no field 'nope'"),
    ):
        with pytest.raises(EcifError, match=message):
            export_pairs(scored, path, **options)
    assert taken.read_text() == "mine"
    assert export_pairs(scored, taken, overwrite=True) == 6


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ({"count": 2}, [-2.0, -1.0]),
        ({"count": 99}, [-2.0, -1.0]),
        ({"share": 0.4}, [-2.0, -1.0]),
        ({"threshold": 0.0}, [-2.0, -1.0]),
    ],
)
def test_a_sample_that_a_view_repeats_is_selected_once(limit, expected, scored):
    view = scored.limit(4).concat(scored.skip(1))
    assert len(view) == 9
    assert select_by_influence(view, "ecif_influence", **limit).values("ecif_influence") == expected
    assert tag_by_influence(view, **limit).values("ecif_influence") == expected
    assert scored.count_sample_tags() == {"harmful": len(expected)}


def test_a_sample_that_a_view_repeats_is_exported_once(scored, tmp_path):
    view = scored.skip(3).concat(scored.limit(4))
    assert export_pairs(view, tmp_path / "pairs.json") == 6
    captions = [row["caption"] for row in json.loads((tmp_path / "pairs.json").read_text())]
    assert captions == ["d", "e", "f", "=1+1", 'ünï, "code"', "c"]
