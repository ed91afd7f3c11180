"""Tables of options: one declaration, and what cannot be is refused by it."""

import inspect
from dataclasses import FrozenInstanceError, dataclass, replace

import pytest

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.settings.fine_tuning import FitSettings
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.settings.job import JobSettings
from fiftyone_ecif.settings.misalignment import MisalignmentSettings
from fiftyone_ecif.settings.option import Settings, check_known, documented, option, same

TABLES = (InfluenceSettings, MisalignmentSettings, FitSettings, JobSettings)


@pytest.mark.parametrize("table", TABLES)
def test_every_option_is_described(table):
    for name, known in table.options().items():
        assert known.help, name
        assert not known.help.endswith("."), name
        assert known.label, name


@pytest.mark.parametrize("table", TABLES)
def test_defaults_are_what_is_made_without_arguments(table):
    made = table()
    left_open = {"solver", "keep_gradients"}  # chosen when it is made
    assert {name: getattr(made, name) for name in table.defaults() if name not in left_open} == {
        name: value for name, value in table.defaults().items() if name not in left_open
    }


def test_settings_cannot_be_changed():
    settings = InfluenceSettings()
    with pytest.raises(FrozenInstanceError):
        settings.fit = True
    assert replace(settings, fit=True).fit
    assert not settings.fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proximal": 0}, "proximal=0 must be a positive number"),
        ({"proximal": float("nan")}, "proximal=nan must be a positive number"),
        ({"damping": -0.1}, "damping=-0.1 must be a number from 0 up"),
        ({"batch_size": 1}, "batch_size=1 leaves no negatives"),
        ({"batch_size": 2.5}, "batch_size=2.5 must be a whole number"),
        ({"n_partitions": 0}, "n_partitions=0 must be at least 1"),
        ({"seed": "first"}, "seed='first' must be a whole number"),
        ({"seed": None}, "seed=None must be a whole number"),
        ({"proximal": None}, "proximal=None must be a positive number"),
        ({"role": "both"}, "role='both' is not available. Use one of exact, taylor"),
        ({"solver": "newton"}, "solver='newton' is not available. Use one of hessian, ggn"),
        ({"target_loss": "accuracy"}, "target_loss='accuracy' is not available. Use one of contrastive"),
        ({"scores": ["rank"]}, "scores='rank' is not available. Use one of relative_influence"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(options, message):
    with pytest.raises(EcifError, match=message):
        InfluenceSettings(**options)


def test_an_unknown_detector_is_refused_with_what_is_known():
    with pytest.raises(EcifError, match=r"detector='guess' is not available. Use one of calibrated, clip_score"):
        MisalignmentSettings(detector="guess")


def test_what_is_left_open_is_chosen():
    assert (InfluenceSettings().solver, InfluenceSettings().keep_gradients) == ("hessian", True)
    deep = InfluenceSettings(scope="blocks:1")
    assert (deep.solver, deep.keep_gradients) == ("ggn", False)
    assert InfluenceSettings(scope="blocks:1", scores=["self_influence"]).keep_gradients


def test_a_function_stays_the_same_when_settings_are_made_from_it_anew():
    def loss(images, captions, logits):
        return logits.diagonal()

    settings = InfluenceSettings(target_loss=loss)
    assert settings.target_loss_name == "function loss"
    assert replace(settings, batch_size=8).function_token == settings.function_token != ""
    assert InfluenceSettings(target_loss=loss).function_token != settings.function_token


def test_a_table_takes_what_is_its_own():
    given = {"fit": True, "device": "cpu", "nonsense": 1}
    assert InfluenceSettings.take(given).fit
    assert JobSettings.take(given).device == "cpu"
    with pytest.raises(EcifError, match=r"There is no option 'nonsense'. Options: caption_field"):
        check_known(given, InfluenceSettings, JobSettings)


def test_signature_and_description_of_a_function_are_its_tables():
    @dataclass(frozen=True)
    class Cut(Settings):
        share: float = option(0.1, "how much to take", label="Share", above=0.0)

    @dataclass(frozen=True)
    class DeepCut(Settings):
        share: float = same(Cut, "share", default=0.5)
        words: tuple[str, ...] = option((), "what to look for", label="Words")

    @documented(DeepCut)
    def cut(samples, *, progress=None, **options):
        """Cuts.

        Args:
            samples: what.
            {options}
        """

    parameters = inspect.signature(cut).parameters
    assert list(parameters) == ["samples", "progress", "share", "words"]
    assert parameters["share"].default == 0.5
    assert "share (0.5): how much to take" in cut.__doc__
    assert "words: what to look for" in cut.__doc__
    with pytest.raises(EcifError, match="share=0 must be a positive number"):
        DeepCut(share=0)
    assert DeepCut(words=["a"]).words == ("a",)
