"""The plugin as it is installed: from a link, a download and a wheel."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import fiftyone.operators as foo
import yaml
from operator_driver import PLUGIN, operator, resolve

ROOT = Path(__file__).resolve().parents[3]
LISTED = yaml.safe_load((ROOT / "fiftyone.yml").read_text())


def test_yml_lists_what_is_registered():
    listed = LISTED["operators"] + LISTED["panels"]
    registered = [op.name for op in foo.list_operators(builtin=False) if op.plugin_name == PLUGIN]
    assert sorted(listed) == sorted(registered)
    assert all(operator(name).config.icon for name in listed)


LIST = """
import sys, fiftyone.operators as foo, fiftyone.operators.registry as registry
print(sorted(op.name for op in foo.list_operators(builtin=False)))
assert not registry.OperatorRegistry().list_errors(), registry.OperatorRegistry().list_errors()
assert "torch" not in sys.modules and "open_clip" not in sys.modules
import fiftyone_ecif
print(fiftyone_ecif.__file__)
homes = [m for m in sys.modules.values() if str(getattr(m, "__file__", "")).endswith("fiftyone_ecif/__init__.py")]
assert len(homes) == 1, homes
"""


def list_in_a_fresh_process(plugins, path=""):
    """Lists the operators of a plugins folder in a process that does not see the package under test as installed."""
    hide = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
    ran = subprocess.run(
        [sys.executable, "-c", hide + LIST],
        cwd=plugins,
        env=os.environ | {"FIFTYONE_PLUGINS_DIR": str(plugins), "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()[-2:]


SHIPPED = (
    "fiftyone.yml",
    "requirements.txt",
    "operators/__init__.py",
    "operators/panel/keys.js",
    "skills/curate-pairs/SKILL.md",
)
OPERATORS = str(sorted(LISTED["operators"] + LISTED["panels"]))  # FiftyOne counts panels among the operators


def test_the_plugin_works_from_a_link_where_the_package_is_not_installed(tmp_path):
    (tmp_path / "link").symlink_to(ROOT)
    found, home = list_in_a_fresh_process(tmp_path)
    assert found == OPERATORS
    assert Path(home) == ROOT / "fiftyone_ecif" / "__init__.py"


def test_the_plugin_is_downloaded_with_the_library_beside_it(tmp_path):
    archive = tmp_path / "served" / "fiftyone-ecif.zip"
    archive.parent.mkdir()
    folders = [path for name in ("operators", "fiftyone_ecif", "skills") for path in (ROOT / name).rglob("*")]
    with zipfile.ZipFile(archive, "w") as file:
        for path in [ROOT / "fiftyone.yml", ROOT / "requirements.txt", *folders]:
            if path.is_file() and "__pycache__" not in path.parts:
                file.write(path, Path("fiftyone-ecif-main") / path.relative_to(ROOT))
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ran = subprocess.run(
            [
                *(Path(sys.executable).with_name("fiftyone"), "plugins", "download"),
                f"http://127.0.0.1:{server.server_port}/{archive.name}",
            ],
            env=os.environ | {"FIFTYONE_PLUGINS_DIR": str(plugins)},
            capture_output=True,
            text=True,
        )
        server.shutdown()
    assert ran.returncode == 0, ran.stderr
    assert all((plugins / PLUGIN / name).is_file() for name in SHIPPED)
    found, home = list_in_a_fresh_process(plugins)
    assert found == OPERATORS
    assert Path(home) == plugins / PLUGIN / "fiftyone_ecif" / "__init__.py"


def test_the_plugin_works_from_the_wheel(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        assert {name.split("/")[0] for name in archive.namelist()} == {
            "fiftyone_ecif",
            wheel.name.split("-py3")[0] + ".dist-info",
        }
    assert all((site / "fiftyone_ecif/plugin" / name).is_file() for name in SHIPPED)
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    installed = subprocess.run(
        [sys.executable, "-c", "from fiftyone_ecif.cli.main import main; main()", "plugin", "install"],
        cwd=site,
        env=os.environ | {"FIFTYONE_PLUGINS_DIR": str(plugins), "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert installed.returncode == 0, installed.stderr
    assert (plugins / PLUGIN).resolve() == site / "fiftyone_ecif" / "plugin"
    found, home = list_in_a_fresh_process(plugins, site)
    assert found == OPERATORS
    assert Path(home).is_relative_to(site)
    shutil.rmtree(ROOT / "build", ignore_errors=True)


def test_a_missing_dependency_is_an_install_hint(dataset, monkeypatch):
    package = type(operator("compute_influence")).__module__.rpartition(".")[0]
    monkeypatch.setattr(sys.modules[f"{package}.forms"], "MISSING", ["open_clip"])
    for name in LISTED["operators"]:
        assert "pip install" in resolve(dataset, name, {})["missing"]["error_message"]
