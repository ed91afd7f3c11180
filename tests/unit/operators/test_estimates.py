"""What forms and panel say of how long a job takes."""

import open_clip
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fiftyone_ecif.models.open_clip_library import OpenClipLibrary
from fiftyone_ecif.progress import Progress, partition, piece
from operators import estimates
from operators.estimates import Course, Plan, estimate, remember


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A clock that is set by hand, and a cache of its own."""
    monkeypatch.setenv("FIFTYONE_ECIF_CACHE_DIR", str(tmp_path))
    now = [0.0]
    monkeypatch.setattr(estimates.time, "monotonic", lambda: now[0])
    return now


def plan(pairs=100, partitions=1, model="RN50", scope="heads"):
    return Plan("kind", pairs, model, scope, partitions)


def follow(course, clock, *steps):
    """Shows a course steps, each with the time at which it comes."""
    for at, *step in steps:
        clock[0] = at
        course.see(Progress(*step))


def test_what_the_next_run_takes(clock, tmp_path):
    course = Course(plan())
    course.seconds = {"Loading the model": 4.0, "Encoding images": 10.0, "Encoding captions": 5.0, "Scoring": 2.0}
    course.encoded = 50
    remember(course, 100)
    assert estimate(plan(300)).startswith("Takes about 10 s, and up to 90 s more")
    assert estimate(plan(300, partitions=20_000)).startswith("Takes about 33.3 h, and up to 90 s more")
    course.encoded, course.seconds = 0, {"Scoring": 600.0}
    remember(course, 100)
    assert estimate(plan(100)).startswith("Takes about 10 min, and up to 30 s more")
    (tmp_path / "estimates.json").write_text("{")
    assert "No such run has ended on this machine yet" in estimate(plan())


def test_the_first_guess_goes_by_the_size_of_the_model(monkeypatch, clock):
    monkeypatch.setattr(estimates, "_multiplications_a_second", lambda: 1.25e10)  # of which towers reach 1e10
    assert "about 12 min. No such run" in estimate(plan(1000, model="ViT-B-32"))
    assert "about 40.4 h" in estimate(plan(1000, model="ViT-B-32", scope="lora:4"))
    assert "not known yet" in estimate(plan(model="convnext_base"))
    assert "not known yet" in estimate(plan(model="no such model"))


@pytest.mark.parametrize("model", ["ViT-B-32", "RN50"])
def test_multiplications_are_those_of_the_towers(model):
    towers = open_clip.create_model(model).eval()
    with FlopCounterMode(display=False) as counter:
        towers.encode_image(torch.zeros(1, 3, 224, 224))
        towers.encode_text(torch.ones(1, 77, dtype=torch.long))
    assert OpenClipLibrary().multiplications(model) == pytest.approx(counter.get_total_flops() / 2, rel=0.3)


def test_stages_are_timed(clock):
    course = Course(plan())
    follow(course, clock, (1, "Reading pairs", 0, 1), (3, "Encoding images", 0, 40), (7, "Scoring", 0, 1))
    assert course.seconds == {"Reading pairs": 3.0, "Encoding images": 4.0}
    assert course.encoded == 40


def test_the_time_that_remains_is_that_of_all_partitions(clock):
    course = Course(plan(partitions=1000))
    follow(course, clock, (0, "Fitting", 0, 100, 1, 1000), (1, "Scoring", 1, 2, 1, 1000))
    assert course.left is None  # one partition that has not ended says too little
    follow(course, clock, (2, "Fitting", 0, 100, 2, 1000))
    assert course.left == pytest.approx(2 * 999, rel=0.01)
    follow(course, clock, (3, "Scoring", 1, 2, 2, 1000), (4, "Fitting", 0, 100, 3, 1000))
    assert course.left == pytest.approx(2 * 998, rel=0.01)
    assert course.share == pytest.approx(4 / (2 * 1000), rel=0.01)


def test_the_time_that_remains_is_that_of_all_stages(clock):
    course = Course(plan())
    stages = {"Reading pairs": 1.0, "Fitting": 10.0, "Solving": 20.0, "Scoring": 4.0, "Writing fields": 5.0}
    course.seconds = dict(stages)
    remember(course, 100)
    clock[0] = 100.0
    course, at, said = Course(plan()), 100.0, []
    for stage, seconds in stages.items():
        for done in range(10):
            clock[0] = at + seconds * done / 10
            course.see(Progress(stage, done, 10))
            said.append((clock[0] + course.left, course.share))
        at += seconds
    ends, shares = zip(*said, strict=True)
    assert ends == pytest.approx([140.0] * len(ends))
    assert list(shares) == sorted(shares)
    assert shares[-1] == pytest.approx(0.9875)


def test_a_part_of_a_stage_is_not_taken_for_the_whole():
    def work():
        yield Progress("Solving", 50, 100)
        return "done"

    def both():
        first = yield from piece(work(), 0, 2)
        second = yield from piece(work(), 1, 2)
        return first, second

    steps = partition(both(), 3, 4)
    assert [next(steps), next(steps)] == [Progress("Solving", 50, 200, 3, 4), Progress("Solving", 150, 200, 3, 4)]
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert end.value.value == ("done", "done")
