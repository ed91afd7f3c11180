"""The command line: the plugin's jobs from a shell.

Results go to stdout, progress and messages to stderr. Exit code 1: the job
failed; 2: the command was misused.
"""

from __future__ import annotations

import click

from fiftyone_ecif import __version__
from fiftyone_ecif.cli import influence, install, misalignment, runs, samples
from fiftyone_ecif.cli.bench import bench


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Which image-caption pairs help a CLIP-style model, which hurt it, and why."""


for command in (
    *(install.demo, influence.score, influence.fit, misalignment.misalignment, misalignment.review),
    *(samples.tag, samples.export, influence.trace, influence.edit),
    *(runs.runs, runs.rename, runs.delete, runs.cache, install.plugin, install.doctor, bench),
):
    main.add_command(command)
