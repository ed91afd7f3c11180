"""What takes seconds to import and is not needed stays out."""

import subprocess
import sys

SCORES = """
import sys
from fiftyone_ecif.bench.speed import growth
growth._score(300)
print(sorted({"torch._dynamo", "fiftyone", "open_clip"} & {*sys.modules}))
"""


def test_scoring_heads_needs_no_compiler():
    done = subprocess.run([sys.executable, "-c", SCORES], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
