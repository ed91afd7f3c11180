"""Without FiftyOne: where only unit tests run, importing it is an error, so that they are known not to need it."""

import sys
from pathlib import Path

OTHERS = {"integration", "browser"}


def pytest_configure(config):
    """Called where this folder, or something in it, is named on the command line."""
    if not any(OTHERS & set(Path(str(argument).split("::")[0]).parts) for argument in config.args):
        sys.modules["fiftyone"] = None
