"""Finds the packages, so that none is forgotten in the wheel. All else is in pyproject.toml."""

from setuptools import find_packages, setup

PLUGIN = "fiftyone_ecif.plugin"  # what FiftyOne loads lies at the top of a clone, and inside an installed package

setup(
    packages=[
        *find_packages(include=["fiftyone_ecif", "fiftyone_ecif.*"]),
        PLUGIN,
        *(f"{PLUGIN}.{package}" for package in find_packages(include=["operators", "operators.*"])),
    ],
    package_dir={PLUGIN: ".", f"{PLUGIN}.operators": "operators"},
)
