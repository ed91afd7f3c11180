"""What this machine has of what the plugin uses."""

from __future__ import annotations

import importlib.util
import shutil
from typing import NamedTuple

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.install.database import mongod, what_is_wrong


class Check(NamedTuple):
    """One thing that was looked for.

    Attributes:
        name: what it is.
        ok: whether it is there.
        found: what was found, or what to do.
        required: whether nothing works without it.
    """

    name: str
    ok: bool
    found: str
    required: bool


def examine() -> list[Check]:
    """Looks for all that the plugin uses."""
    return [_database(), _torch(), *_packages(), _cache(), _plugin(), _browser()]


def _database() -> Check:
    import fiftyone as fo

    if fo.config.database_uri:
        return Check("database", True, f"FiftyOne connects to {fo.config.database_uri.split('@')[-1]}", True)
    found = mongod()
    wrong = what_is_wrong(found) if found else "there is no mongod"
    remedy = f"{wrong}. Run python -m fiftyone_ecif.install.database, or set FIFTYONE_DATABASE_URI"
    return Check("database", wrong is None, remedy if wrong else str(found), True)


def _torch() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("torch", False, "pip install torch torchvision", True)
    import torch

    from fiftyone_ecif.devices import say_device

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Check("torch", True, f"{torch.__version__}; {say_device(device)}", True)


def _packages() -> list[Check]:
    checks = []
    for module, package in (("open_clip", "open_clip_torch"), ("h5py", "h5py")):
        found = importlib.util.find_spec(module) is not None
        checks.append(Check(package, found, "installed" if found else f"pip install {package}", True))
    found = importlib.util.find_spec("transformers") is not None
    remedy = "SigLIP, CLIPA and text towers of the hub need it: pip install 'fiftyone-ecif[transformers]'"
    checks.append(Check("transformers", found, "installed" if found else remedy, False))
    return checks


def _cache() -> Check:
    if importlib.util.find_spec("h5py") is None:
        return Check("cache", False, "needs h5py", True)
    from fiftyone_ecif.store.files import cache_folder
    from fiftyone_ecif.store.tables import Store

    store = Store("doctor")
    try:
        store.ensure_writable()
    except EcifError as error:
        return Check("cache", False, str(error), True)
    store.delete()
    return Check("cache", True, str(cache_folder()), True)


def _plugin() -> Check:
    import fiftyone.plugins as fop

    from fiftyone_ecif.install.plugin import PLUGIN

    found = [plugin for plugin in fop.list_plugins(enabled="all") if plugin.name == PLUGIN]
    return Check("plugin", bool(found), str(found[0].directory) if found else "fiftyone-ecif plugin install", False)


def _browser() -> Check:
    names = ("chromium", "google-chrome", "chromium-browser", "firefox")
    found = next((place for place in map(shutil.which, names) if place), None)
    return Check("browser", found is not None, found or "none here; open the App's address from another machine", False)
