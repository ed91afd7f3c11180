"""A run with all that belongs to it in the database, as it was or as it shall be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from bson import json_util
from fiftyone.core.brain import BrainMethodConfig, BrainResults
from fiftyone.core.view import DatasetView

from fiftyone_ecif.runs.reading import read_results
from fiftyone_ecif.samples.pairs import every_sample


class RunVersion(NamedTuple):
    """What the database holds of a run.

    Attributes:
        scores: ``{field: {sample id: value}}``; other samples have no value.
        config: its configuration; None if there is no run, but fields only.
        results: its results; None if it was stopped before they were written.
        stages: of its view, each as JSON; None of a whole dataset.
        when: it was made; None for the time at which it is recorded.
    """

    scores: Mapping[str, Mapping[str, Any]]
    config: Any = None
    results: Any = None
    stages: list[str] | None = None
    when: datetime | None = None

    def serialize(self) -> dict[str, Any]:
        """As plain values, which :mod:`bson.json_util` can write."""
        config, results = self.config and self.config.serialize(), self.results and self.results.serialize()
        return self._asdict() | {"config": config, "results": results}


def new_version(results: Any, scores: Mapping[str, Mapping[str, Any]]) -> RunVersion:
    """What is to be recorded of a run.

    Args:
        results: of the run.
        scores: ``{field: {sample id: value}}``.
    """
    view = results.samples
    stages = view._serialize(include_uuids=False) if isinstance(view, DatasetView) else None
    as_json = None if stages is None else [json_util.dumps(stage) for stage in stages]
    return RunVersion(scores, results.config, results, as_json)


def version_in(dataset: Any, key: str, fields: Iterable[str]) -> RunVersion:
    """What a dataset holds of a run.

    Args:
        dataset: a FiftyOne dataset.
        key: of the run, which may not be there.
        fields: whose values are wanted, those that are there.
    """
    scores = {
        name: dict(zip(*every_sample(dataset).exists(name).values(["id", name]), strict=True))
        for name in fields
        if dataset.has_sample_field(name)
    }
    if not dataset.has_brain_run(key):
        return RunVersion(scores)
    info = dataset.get_brain_info(key)
    results = read_results(dataset, key)
    return RunVersion(scores, info.config, results, dataset._doc.brain_methods[key].view_stages, info.timestamp)


def restored_version(dataset: Any, key: str, found: Mapping[str, Any]) -> RunVersion:
    """A version as :meth:`RunVersion.serialize` gave it.

    Args:
        dataset: a FiftyOne dataset.
        key: of the run.
        found: the plain values.

    Returns:
        the version; its results know the dataset in place of their view, which may name a field that is gone
    """
    version = RunVersion(**found)
    if version.config is None:
        return version
    config = BrainMethodConfig.from_dict(version.config)
    results = version.results and BrainResults.from_dict(version.results, dataset, config, key)
    return version._replace(config=config, results=results)
