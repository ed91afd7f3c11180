"""What docstrings refer to is there."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = re.compile(r":(?:func|class|mod|data|meth|attr):`~?((?:fiftyone_ecif|operators)[\w.]*)`")
REFERENCES = {
    (reference, path.relative_to(ROOT).as_posix())
    for package in ("fiftyone_ecif", "operators")
    for path in (ROOT / package).rglob("*.py")
    for reference in REFERENCE.findall(path.read_text())
}


def is_there(name):
    """Whether it is a module, or something in one, or an attribute of a class in one."""
    module, inside = name, []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, part = module.rpartition(".")
            inside.insert(0, part)
    for part in inside:
        if not hasattr(found, part):
            return part in getattr(found, "__annotations__", {})
        found = getattr(found, part)
    return True


def test_all_are_there():
    assert len(REFERENCES) > 30
    assert [found for found in sorted(REFERENCES) if not is_there(found[0])] == []


@pytest.mark.parametrize("name", ["fiftyone_ecif.gone", "fiftyone_ecif.runs.manage.gone", "fiftyone_ecif.runs.gone.it"])
def test_what_is_gone_is_not(name):
    assert not is_there(name)
