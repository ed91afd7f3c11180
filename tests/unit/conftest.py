"""Without FiftyOne: importing it here is an error, so that what needs no database is known not to."""

import sys

sys.modules["fiftyone"] = None
