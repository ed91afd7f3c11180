"""The tables of docs/results that list what can be chosen by name are those that the registries give."""

import pytest

from tools.make_tables import FOLDER, pages


@pytest.mark.parametrize("name", pages())
def test_a_table_is_up_to_date(name):
    assert (FOLDER / name).read_text() == pages()[name], "run: python tools/make_tables.py"
