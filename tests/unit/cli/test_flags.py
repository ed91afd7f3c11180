"""Flags of the shell from tables of options."""

from dataclasses import dataclass

import click
import pytest
from click.testing import CliRunner

from fiftyone_ecif.cli.flags import flags
from fiftyone_ecif.cli.influence import score
from fiftyone_ecif.cli.misalignment import misalignment
from fiftyone_ecif.influence.solvers import SOLVERS, Solver
from fiftyone_ecif.influence.target_losses import TARGET_LOSSES, TargetLoss
from fiftyone_ecif.misalignment.detectors import DETECTORS, Detector
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.settings.job import JobSettings
from fiftyone_ecif.settings.misalignment import MisalignmentSettings
from fiftyone_ecif.settings.option import Settings, option


@dataclass(frozen=True)
class Kinds(Settings):
    name: str = option("a", "its name", label="Name", choices=lambda: ("a", "b"))
    count: int = option(3, "how many", label="Count")
    on: bool = option(True, "whether to do it", label="On")
    off: bool = option(False, "whether to leave it", label="Off")
    either: bool | None = option(None, "whether to decide", label="Either", kind=bool)
    words: tuple[str, ...] = option((), "words to find", label="Words", flag="--word")
    hidden: int = option(0, "for Python only", label="Hidden", flag="")


@pytest.fixture
def parse():
    @click.command()
    @flags(Kinds)
    def command(**options):
        click.echo(repr(Kinds(**options)))

    def run(*arguments):
        return CliRunner().invoke(command, arguments)

    return run


def test_without_flags_options_have_their_defaults(parse):
    assert parse().output.strip() == repr(Kinds())


def test_flags_are_options(parse):
    said = parse("--name", "b", "--count", "5", "--no-on", "--off", "--either", "--word", "x", "--word", "y")
    made = Kinds(name="b", count=5, on=False, off=True, either=True, words=("x", "y"))
    assert said.output.strip() == repr(made)


def test_what_is_for_python_only_has_no_flag(parse):
    assert parse("--hidden", "1").exit_code == 2
    assert "hidden" not in parse("--help").output


@pytest.mark.parametrize("names", [("name",), ("count",), ("on",), ("words",)])
def test_the_help_says_what_the_table_says(parse, names):
    text = " ".join(parse("--help").output.split())
    for name in names:
        assert Kinds.options()[name].help.removeprefix("whether to ")[1:] in text


@pytest.mark.parametrize(("command", "table"), [(score, InfluenceSettings), (misalignment, MisalignmentSettings)])
def test_every_option_has_its_flag(command, table):
    taken = {parameter.name for parameter in command.params}
    wanted = {name for each in (table, JobSettings) for name, known in each.options().items() if known.flag != ""}
    assert wanted <= taken


@pytest.mark.parametrize(
    ("registry", "base", "command", "flag"),
    [
        (SOLVERS, Solver, score, "--solver"),
        (TARGET_LOSSES, TargetLoss, score, "--target-loss"),
        (DETECTORS, Detector, misalignment, "--detector"),
    ],
)
def test_what_is_registered_later_is_offered_too(registry, base, command, flag):
    name = "made_by_a_test"
    said = {"name": name, "says": "nothing", "unit": "nats"}
    later = type("Later", (base,), said | dict.fromkeys(base.__abstractmethods__, lambda *_: None))
    assert name not in CliRunner().invoke(command, ["--help"]).output
    registry.register(later)
    try:
        assert name in CliRunner().invoke(command, ["--help"]).output.replace("\n", "").replace(" ", "")
    finally:
        registry.withdraw(name)
    refused = CliRunner().invoke(command, ["dataset", flag, name])
    assert refused.exit_code == 2
    assert name in refused.output
