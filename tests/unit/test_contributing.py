"""The recipes of CONTRIBUTING.md that need nothing but this page: followed in a copy, their own tests pass."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
IGNORED = shutil.ignore_patterns("__pycache__", "bench", "api", "cli", "runs", "integration", "browser")


@pytest.mark.parametrize("recipe", ["A detector", "A solver", "A target loss"])
def test_a_recipe_works(recipe, tmp_path):
    for folder in ("fiftyone_ecif", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=IGNORED)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    steps = PAGE.split(f"\n### {recipe}\n")[1].split("\n### ")[0]
    blocks = re.findall(r"\d\. (At the end of )?`([\w/]+\.py)`:\n\n +```python\n(.*?)\n +```\n", steps, re.S)
    assert [bool(at_the_end) for at_the_end, _, _ in blocks] == [True, False]
    for at_the_end, path, code in blocks:
        with (tmp_path / path).open("a" if at_the_end else "x") as file:
            file.write(f"\n\n{dedent(code)}\n")
    command = [sys.executable, "-m", "pytest", "-q", "--doctest-modules", *(path for _, path, _ in blocks)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
