"""Files of other formats, and datasets that went through FiftyOne's own operations."""

import fiftyone as fo
import numpy as np
import pytest
from PIL import Image, features

from fiftyone_ecif import EcifError, trace

FORMATS = ["webp", "tiff", "gif", "bmp", "cmyk.jpg", "avif"]


@pytest.mark.parametrize("kind", FORMATS)
def test_files_of_other_formats_give_the_same_scores(kind, dataset, score, tmp_path):
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    train, val = dataset.match_tags("train"), dataset.match_tags("val")
    before = score(train, val, brain_key="png")
    for sample in train.iter_samples(autosave=True):
        path = tmp_path / f"{sample.id}.{kind}"
        with Image.open(sample.filepath) as image:
            image = image.convert("CMYK") if kind == "cmyk.jpg" else image.convert("RGB")
            best = {"webp": {"lossless": True}, "cmyk.jpg": {"quality": 95, "subsampling": 0}, "avif": {"quality": 95}}
            image.save(path, **best.get(kind, {}))
        sample.filepath = str(path)
    results = score(train, val)
    assert not results.skipped
    assert not before.skipped
    same = np.corrcoef(train.values("ecif_influence"), train.values("png_influence"))[0, 1]
    assert same > (0.999 if kind in ("webp", "tiff", "bmp") else 0.8)


def clone(dataset):
    return dataset.clone()


def merged(dataset):
    other = fo.Dataset()
    other.merge_samples(dataset)
    return other


def merged_by_path(dataset):
    other = dataset.exclude_fields("caption").clone()
    other.merge_samples(dataset, key_field="filepath")
    return other


def picked(dataset):
    return dataset.select_fields("caption")


def left_out(dataset):
    dataset.add_sample_field("extra", fo.StringField)
    return dataset.exclude_fields("extra")


def saved(dataset):
    dataset.save_view("kept", dataset.sort_by("filepath"))
    return dataset.load_saved_view("kept")


def renamed(dataset):
    dataset.rename_sample_field("caption", "words")
    dataset.rename_sample_field("words", "caption")
    return dataset


def embedded(dataset):
    dataset.add_sample_field("about", fo.EmbeddedDocumentField, embedded_doc_type=fo.DynamicEmbeddedDocument)
    dataset.clone_sample_field("caption", "about.caption")
    return dataset


@pytest.mark.parametrize(
    "operation",
    [clone, merged, merged_by_path, picked, left_out, saved, renamed, embedded],
    ids=lambda each: each.__name__,
)
def test_datasets_after_other_operations_give_the_same_scores(operation, dataset, score):
    score(dataset.match_tags("train"), dataset.match_tags("val"), brain_key="first")
    expected = dict(zip(*dataset.match_tags("train").values(["filepath", "first_influence"]), strict=True))
    made = operation(dataset)
    field = "about.caption" if operation is embedded else "caption"
    results = score(made.match_tags("train"), made.match_tags("val"), caption_field=field)
    home = made._dataset
    try:
        found = dict(zip(*home.match_tags("train").values(["filepath", "ecif_influence"]), strict=True))
        assert found.keys() == expected.keys()
        paths = sorted(found)
        np.testing.assert_allclose([found[path] for path in paths], [expected[path] for path in paths], rtol=1e-4)
        assert trace(results, limit=1)
    finally:
        if home is not dataset:
            home.delete()


@pytest.mark.parametrize("kind", ["video", "patches"])
def test_what_is_no_set_of_images_is_one_error_before_work(kind, dataset, score, tmp_path):
    if kind == "patches":
        for sample in dataset.iter_samples(autosave=True):
            sample["found"] = fo.Detections(detections=[fo.Detection(label="digit", bounding_box=[0, 0, 0.5, 0.5])])
        samples = dataset.to_patches("found")
    else:
        path = tmp_path / "clip.mp4"
        path.write_bytes(b"no film")
        samples = fo.Dataset()
        samples.add_sample(fo.Sample(str(path), caption="a film"))
    with pytest.raises(EcifError) as found:
        score(samples, dataset.match_tags("val"))
    assert len(str(found.value)) < 300
