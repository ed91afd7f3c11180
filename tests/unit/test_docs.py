"""What the pages name is there: links, files and folders."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "skills").rglob("*.md")),
]


def anchors(page):
    """Of the headings of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            to = page.parent / path if path else page
            assert to.exists(), link
            assert not anchor or anchor in anchors(to), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_are_there(page):
    text = page.read_text()
    made = set(re.findall(r"`([\w/]+\.py)`:\n\n +```", text))  # by a recipe
    for name in re.findall(r"\b(?:fiftyone_ecif|operators|tests|tools)(?:/\w+)*/\w+\.py\b", text):
        assert name in made or (ROOT / name).is_file(), name
    for name in re.findall(r"(?:-m |from |import )(fiftyone_ecif(?:\.\w+)+)", text):
        path = name.replace(".", "/")
        assert f"{path}.py" in made or (ROOT / f"{path}.py").is_file() or (ROOT / path).is_dir(), name


def test_the_tree_names_every_folder():
    tree = (ROOT / "docs" / "architecture.md").read_text().split("## The tree")[1].split("```")[1]
    folders = {path.parent for path in (ROOT / "fiftyone_ecif").glob("*/__init__.py")}
    assert len(folders) > 5
    assert {f"{folder.name}/" for folder in folders} <= set(tree.split())
