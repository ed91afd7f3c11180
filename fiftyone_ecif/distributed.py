"""Several processes that share a job, and what they tell one another.

``torchrun`` starts them; ``torch.distributed`` carries sums between them. Each
takes every so-manieth batch, so all of them must see the same samples and the
same cache folder.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fiftyone_ecif.errors import EcifError

T = TypeVar("T")
_PATIENCE = timedelta(days=7)  # one may encode much longer than the others; that one died is noticed at once


class ProcessGroup:
    """The place of this process among those that share a job.

    Args:
        rank (0): its number.
        count (1): how many there are.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @staticmethod
    def here() -> ProcessGroup:
        """Of this process, as torch.distributed knows it; alone if that was not started."""
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        return ProcessGroup(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what all have found."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that this process takes: those of all processes are all items."""
        return items[self.rank :: self.count]

    def total(self, part: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in each of them."""
        if self.count == 1:
            return part
        whole = part.detach().clone()
        try:
            dist.all_reduce(whole)
        except RuntimeError as error:
            raise _ended(error) from error
        return whole

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, in each of them, those of the first one first."""
        if self.count == 1:
            return items
        lists: list[list[T]] = [[]] * self.count
        try:
            dist.all_gather_object(lists, items)
        except RuntimeError as error:
            raise _ended(error) from error
        return [item for each in lists for item in each]

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self.gather([])


ALONE = ProcessGroup()


def join() -> ProcessGroup:
    """Meets the other processes that ``torchrun`` started, if it did.

    Raises:
        EcifError: if they cannot be reached
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    place = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(place % gpus)
    # NCCL carries nothing that is on the CPU, and refuses two processes on one GPU: gloo does both
    crowded = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > gpus
    backend = "gloo" if crowded or not dist.is_nccl_available() else "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise EcifError(f"The other processes cannot be reached ({error}). Start them with torchrun") from error
    atexit.register(dist.destroy_process_group)
    return ProcessGroup.here()


def _ended(error: RuntimeError) -> EcifError:
    return EcifError(
        f"Another process of this job ended ({str(error).splitlines()[0]}). Its own message says why; "
        "start the job again, and it goes on from what was encoded and computed"
    )
