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
import urllib.parse
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
    request = urllib.request.Request(f"{index}/pip/", headers={"Accept": f"{JSON_INDEX}, text/html;q=0.5"})
    with urllib.request.urlopen(request) as answer:
        page = answer.read().decode()
        is_json = "json" in answer.headers.get("Content-Type", "")
    wheels = {}
    for url, sha256 in files_of_json(page) if is_json else files_of_html(page):
        version = re.search(r"/pip-(\d+)\.(\d+)(?:\.(\d+))?-py3-none-any\.whl$", url)
        if version:
            wheels[tuple(int(part or 0) for part in version.groups())] = url, sha256
    if not wheels:
        sys.exit(f"{index} offers no pip. Install Python's ensurepip (Debian: apt-get install python3-venv)")
    url, sha256 = wheels[max(wheels)]
    with urllib.request.urlopen(urllib.parse.urljoin(f"{index}/pip/", url)) as answer:
        content = answer.read()
    if hashlib.sha256(content).hexdigest() != sha256:
        sys.exit(f"{url} does not have the checksum that the index gives for it")
    path = folder / url.rsplit("/", 1)[1]
    path.write_bytes(content)
    return path


def files_of_json(page: str) -> list[tuple[str, str]]:
    files = [file for file in json.loads(page)["files"] if not file.get("yanked")]
    return [(file["url"], file["hashes"].get("sha256", "")) for file in files]


def files_of_html(page: str) -> list[tuple[str, str]]:
    return re.findall(r'href="([^"#]+)#sha256=([0-9a-f]{64})"(?![^>]*data-yanked)', page)


if __name__ == "__main__":
    main(sys.argv[1])
