"""What all operators are: a button above the grid, a form, and something that it does."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import fiftyone.operators as foo
import fiftyone.operators.types as types

from .forms import unusable
from .jobs import Job, run_job


class FormOperator(foo.Operator):
    """An operator with a button above the grid and a form.

    Attributes:
        identifier: its name in ``fiftyone.yml``.
        title: on the button and above the form.
        about: what it does, in a phrase.
        icon: a name of Material's icons.
        risk: ``"low"``, ``"medium"`` or ``"high"``.
        delegable: whether another process can run it.
    """

    identifier: str
    title: str
    about: str
    icon: str
    risk = "medium"
    delegable = False

    @property
    def config(self) -> foo.OperatorConfig:
        """What FiftyOne asks of an operator."""
        return foo.OperatorConfig(
            name=self.identifier,
            label=self.title,
            description=self.about,
            icon=self.icon,
            dynamic=True,
            allow_delegated_execution=self.delegable,
            risk_level=self.risk,
        )

    def resolve_placement(self, ctx: Any) -> types.Placement:
        """The button above the grid."""
        return types.Placement(
            types.Places.SAMPLES_GRID_SECONDARY_ACTIONS, types.Button(label=self.title, icon=self.icon, prompt=True)
        )

    def resolve_input(self, ctx: Any) -> types.Property:
        """The form; one line of it where no dataset is open or something is not installed."""
        inputs = types.Object()
        if not unusable(inputs, ctx):
            self.ask(inputs, ctx)
        return types.Property(inputs, view=types.View(label=self.title))

    @abstractmethod
    def ask(self, inputs: Any, ctx: Any) -> None:
        """Fills the form, and judges what was entered so far.

        Args:
            inputs: the form.
            ctx: its context.
        """


class JobOperator(FormOperator):
    """An operator that runs long: with progress, in the background if wanted, stoppable."""

    delegable = True

    @property
    def config(self) -> foo.OperatorConfig:
        """What FiftyOne asks of an operator."""
        config = super().config
        config.execute_as_generator = config.allow_immediate_execution = True
        return config

    def execute(self, ctx: Any) -> Iterator[Any]:
        """Runs the job, reporting progress and failures in a way that the App shows."""
        yield from run_job(ctx, self.identifier, self.resolve_run_name(ctx), self.work)

    @abstractmethod
    def work(self, ctx: Any, job: Job) -> Iterator[Any]:
        """Does it, and says what the App is to do meanwhile and at the end.

        Args:
            ctx: of the operator.
            job: that others see and can stop.
        """
