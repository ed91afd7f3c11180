"""Where the databases of earlier versions say that misalignment runs are; see :mod:`fiftyone_ecif.runs`."""

from fiftyone_ecif.runs import Misalignment, MisalignmentConfig, MisalignmentResults

__all__ = ["Misalignment", "MisalignmentConfig", "MisalignmentResults"]
