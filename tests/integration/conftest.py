"""With FiftyOne on a database of its own."""

from with_fiftyone import dataset, grouped, made, python, score, trained  # noqa: F401
