"""Making FiftyOne find the plugin."""

from __future__ import annotations

import os
from pathlib import Path

import fiftyone as fo

from fiftyone_ecif.errors import EcifError

PLUGIN = "@ecif/fiftyone-ecif"


def plugin_folder() -> Path:
    """The folder with ``fiftyone.yml``: inside an installed package, or the clone that it is used from."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "plugin", package.parent):
        if (folder / "fiftyone.yml").is_file():
            return folder
    raise EcifError(f"fiftyone.yml is neither in {package / 'plugin'} nor in {package.parent}. Reinstall fiftyone-ecif")


def install_plugin() -> Path:
    """Links the plugin into FiftyOne's plugins folder; a link of an earlier install is replaced.

    Returns:
        the link

    Raises:
        EcifError: if something else is in its place, or it cannot be made
    """
    folder = plugin_folder()
    plugins = Path(fo.config.plugins_dir)
    link = plugins / PLUGIN
    if plugins.resolve() in (folder, *folder.parents):
        return folder  # FiftyOne already looks here
    if link.exists() and not link.is_symlink():
        raise EcifError(f"{link} is there and is no link. Move it away, then install again")
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_suffix(f".{os.getpid()}")
        temporary.symlink_to(folder, target_is_directory=True)
        os.replace(temporary, link)
    except OSError as error:
        raise EcifError(
            f"{link} cannot be made ({error.strerror}). Set FIFTYONE_PLUGINS_DIR to a folder of yours"
        ) from error
    return link
