"""What processes talk to one another by."""

import pytest
import torch
import torch.distributed as dist

from fiftyone_ecif import distributed


@pytest.mark.parametrize(
    ("gpus", "nccl", "backend"),
    [(2, True, "cpu:gloo,cuda:nccl"), (1, True, "gloo"), (0, True, "gloo"), (2, False, "gloo")],
)
def test_what_is_on_the_cpu_is_carried_too(gpus, nccl, backend, monkeypatch):
    chosen = []
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: None)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: chosen.append(backend))
    monkeypatch.setattr(distributed.atexit, "register", lambda work: None)
    distributed.join()
    assert chosen == [backend]
