"""Makes a virtual environment, also where Python comes without ensurepip, as Debian's does.

Usage: python3 tools/make_venv.py FOLDER. Only the standard library is used. Without
ensurepip, pip is fetched from the package index (PIP_INDEX_URL, or PyPI), its
SHA-256 compared with the index's, and installed with itself.
"""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path

JSON_INDEX = "application/vnd.pypi.simple.v1+json"


def main(folder: str) -> None:
    has_ensurepip = importlib.util.find_spec("ensurepip") is not None
    venv.create(folder, with_pip=has_ensurepip, symlinks=True)
    if not has_ensurepip:
        print("This Python has no ensurepip; pip is fetched from the package index")
        with tempfile.TemporaryDirectory() as temporary:
            wheel = fetch_pip(Path(temporary))
            python = Path(folder) / "bin" / "python"
            subprocess.run([python, wheel / "pip", "install", "-q", "--no-index", wheel], check=True)


def fetch_pip(folder: Path) -> Path:
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    request = urllib.request.Request(f"{index}/pip/", headers={"Accept": JSON_INDEX})
    with urllib.request.urlopen(request) as answer:
        files = json.load(answer)["files"]
    wheels = {}
    for file in files:
        version = re.fullmatch(r"pip-(\d+)\.(\d+)(?:\.(\d+))?-py3-none-any\.whl", file["filename"])
        if version and not file.get("yanked"):
            wheels[tuple(int(part or 0) for part in version.groups())] = file
    newest = wheels[max(wheels)]
    with urllib.request.urlopen(urllib.request.urljoin(f"{index}/pip/", newest["url"])) as answer:
        content = answer.read()
    if hashlib.sha256(content).hexdigest() != newest["hashes"]["sha256"]:
        sys.exit(f"{newest['url']} does not have the checksum that the index gives for it")
    path = folder / newest["filename"]
    path.write_bytes(content)
    return path


if __name__ == "__main__":
    main(sys.argv[1])
