"""Progress bars as everywhere in FiftyOne, and failures that are nobody's fault."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import fiftyone.core.utils as fou
from pymongo.errors import ConnectionFailure

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.progress import Progress, T


def explain(error: Exception) -> EcifError | None:
    """What to do about a failure that is nobody's fault; None of any other."""
    if isinstance(error, ConnectionFailure):
        return EcifError(
            f"FiftyOne's database does not answer any more ({str(error)[:200]}). Start it, and run again: what was "
            "computed is kept, and what was begun to be written is finished then"
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's
        return EcifError(
            f"There is not enough memory ({str(error)[:200]}). Use a smaller batch_size or a smaller scope, or "
            "device='cpu' if it was a GPU's; what was encoded is kept"
        )
    return None


def follow(work: Generator[Progress, None, T], progress: bool | Callable[..., None] | None = None) -> T:
    """Drives work to its end behind FiftyOne's progress bars, one a stage.

    Args:
        work: what to do.
        progress (None): whether to show bars (True/False), FiftyOne's default
            (None), or a callback that takes the bar, as everywhere in FiftyOne.

    Returns:
        what the work returns

    Raises:
        EcifError: as the work does, or if the database is lost or memory runs out
    """
    stage = ""
    bar: Any = None
    try:
        while True:
            step = next(work)
            if step.stage != stage:
                if bar is not None:
                    bar.__exit__(None, None, None)
                stage = step.stage
                bar = fou.ProgressBar(total=step.total, start_msg=stage, iters_str="steps", progress=progress)
                bar.__enter__()
            bar.set_iteration(step.done)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    except Exception as error:
        if explained := explain(error):
            raise explained from error
        raise
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)
        work.close()
