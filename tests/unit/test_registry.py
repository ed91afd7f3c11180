"""Entries by name: added, found, refused and shown."""

import pytest

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.registry import Registry


class Cosine:
    name = "cosine"
    says = "the angle"
    source = "Euclid"


class Plain:
    name = "plain"


@pytest.fixture
def metrics():
    found = Registry("metric")
    found.register(Cosine)
    found.register(Plain)
    return found


def test_entries_are_found_by_name_in_their_order(metrics):
    assert list(metrics) == ["cosine", "plain"]
    assert len(metrics) == 2
    assert isinstance(metrics["plain"], Plain)
    metrics.withdraw("cosine")
    assert list(metrics) == ["plain"]


@pytest.mark.parametrize("name", ["euclid", "", None, ["cosine"]], ids=str)
def test_what_is_not_known_is_said_with_what_is(name, metrics):
    assert name not in metrics
    with pytest.raises(EcifError, match=r"^metric=.* is not available\. Use one of cosine, plain$"):
        metrics[name]


def test_a_name_is_taken_once(metrics):
    with pytest.raises(EcifError, match="There is a metric 'plain' already"):
        metrics.register(Plain)


def test_a_table_has_the_columns_that_say_something(metrics):
    assert metrics.table() == (
        "| name | says | source |\n| --- | --- | --- |\n| cosine | the angle | Euclid |\n| plain |  |  |"
    )
    metrics.withdraw("cosine")
    assert metrics.table() == "| name |\n| --- |\n| plain |"
