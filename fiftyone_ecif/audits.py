"""Where databases of versions before 0.2 say that misalignment runs are; see :mod:`fiftyone_ecif.runs`."""

from fiftyone_ecif.runs import Misalignment, MisalignmentConfig, MisalignmentResults

__all__ = ["Misalignment", "MisalignmentConfig", "MisalignmentResults"]
