"""Options of how a job runs, which its numbers do not depend on."""

from __future__ import annotations

from dataclasses import dataclass

from fiftyone_ecif.settings.option import Settings, option


@dataclass(frozen=True)
class JobSettings(Settings):
    """How a job runs; nothing of it is recorded."""

    device: str | None = option(
        None,
        "where the model runs: cpu, cuda or another torch device; by default a GPU where there is one",
        label="Device",
    )
    num_workers: int | None = option(
        None,
        "threads that read images; by default one for each processor, eight at most",
        label="Workers",
        kind=int,
        least=0,
        flag="",
    )
    skip_failures: bool = option(
        True,
        "whether to skip samples without a caption or with an unreadable image, with a warning, rather than raise",
        label="Skip samples that cannot be scored",
        flag="",
    )
    overwrite: bool = option(False, "whether to replace a run of the same key", label="Replace the run")
