"""Where the App puts the fields of runs: a first-time user finds them, a user's own arrangement stays."""

import fiftyone as fo


def groups(dataset):
    dataset.reload()
    return {group.name: group.paths for group in dataset.app_config.sidebar_groups or []}


def colours(dataset):
    dataset.reload()
    scheme = dataset.app_config.color_scheme
    return {entry["path"]: entry["fieldColor"] for entry in scheme.fields or []} if scheme else {}


def test_scores_have_a_place_and_colours_until_they_are_deleted(dataset, score):
    score(dataset.match_tags("train"), dataset.match_tags("val"))
    fields = ["ecif_influence", "ecif_positive", "ecif_negative", "ecif_rank"]
    assert groups(dataset)["influence"] == fields
    assert next(iter(groups(dataset))) == "influence"
    assert "caption" in groups(dataset)["primitives"]
    assert not set(fields) & set(groups(dataset)["primitives"])
    assert len(set(colours(dataset).values())) == len(fields)
    dataset.rename_brain_run("ecif", "again")
    assert groups(dataset)["influence"] == [field.replace("ecif_", "again_") for field in fields]
    assert set(colours(dataset)) == set(groups(dataset)["influence"])
    dataset.delete_brain_run("again")
    assert "influence" not in groups(dataset)
    assert colours(dataset) == {}


def test_what_the_user_arranged_stays(dataset, score):
    config = dataset.app_config
    config.sidebar_groups = fo.DatasetAppConfig.default_sidebar_groups(dataset)
    config.sidebar_groups.append(fo.SidebarGroupDocument(name="mine", paths=["ecif_influence"]))
    config.color_scheme = fo.ColorScheme(
        color_by="value", fields=[{"path": "ecif_influence", "fieldColor": "#000000"}, {"path": "caption"}]
    )
    dataset.save()
    for _ in range(2):
        score(dataset.match_tags("train"), dataset.match_tags("val"), overwrite=True)
        assert groups(dataset)["mine"] == ["ecif_influence"]
        assert groups(dataset)["influence"] == ["ecif_positive", "ecif_negative", "ecif_rank"]
        assert dataset.app_config.color_scheme.color_by == "value"
        entries = dataset.app_config.color_scheme.fields
        assert [entry["path"] for entry in entries].count("ecif_influence") == 1
        assert {"path": "ecif_influence", "fieldColor": "#000000"} in [dict(entry) for entry in entries]
