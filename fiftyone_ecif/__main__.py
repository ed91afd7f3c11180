"""``python -m fiftyone_ecif`` is the command line."""

from .cli import main

main(prog_name="fiftyone-ecif")
