"""``python -m fiftyone_ecif`` is the command line."""

from fiftyone_ecif.cli.main import main

main(prog_name="fiftyone-ecif")
