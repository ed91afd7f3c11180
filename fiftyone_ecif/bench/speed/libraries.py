"""Other attribution libraries from PyPI, on one job, each in a process of an environment of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

from fiftyone_ecif.bench.speed import library_jobs
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.store.files import cache_folder

_PACKAGES = ("logix-ai==0.1.1", "dattri==0.3.0", "kronfluence==1.0.1", "traker==0.3.2")
_MINUTES = 5


def measure() -> list[dict[str, Any]]:
    """A row a library: CPU seconds from features to scores, or the reason why there are none."""
    python = _environment()
    rows = []
    for name in library_jobs.JOBS:
        program = sys.executable if name in library_jobs.OURS else str(python)
        command = [program, library_jobs.__file__, name]
        try:
            with tempfile.TemporaryDirectory() as folder:  # some leave files where they run
                done = subprocess.run(command, capture_output=True, text=True, timeout=60 * _MINUTES, cwd=folder)
            last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]
            rows.append({"library": name} | (json.loads(last) if done.returncode == 0 else {"reason": last}))
        except subprocess.TimeoutExpired:
            rows.append({"library": name, "reason": f"not done after {_MINUTES} minutes"})
    return rows


def _environment() -> Path:
    """Makes the environment, which shares torch with this one, and returns its Python.

    Raises:
        EcifError: if the packages cannot be installed
    """
    folder = cache_folder() / "bench" / "libraries"
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        venv.create(folder, symlinks=True)
        here = sysconfig.get_paths()["purelib"]
        place = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        (place / "shared.pth").write_text(here + "\n")
        # LogIX says that it needs Python 3.10 at most, and runs on later ones
        command = [str(python), "-m", "pip", "install", "-q", "--ignore-requires-python", *_PACKAGES]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise EcifError(f"The libraries cannot be installed: {done.stderr.strip()[-300:]}. Leave --peers out")
        (folder / "ready").touch()
    return python
