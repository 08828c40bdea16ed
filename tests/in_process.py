"""Train inside this process, one step at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train.config import Config
from train.state import Plan, State, set_up
from train.step import prepare_step, train_step
from train.storage import checkpoint
from train.storage.data import Data, load


@dataclass
class Run:
    """A plan, a state and a function that makes a step, ordinary or replayed."""

    plan: Plan
    state: State
    take_step: Callable[[Plan, State], None] = train_step

    @classmethod
    def open(cls, config: Config, world: Any, source: Data | None = None) -> "Run":
        """Set up a fresh run on an open world."""
        return cls(*set_up(config, world, source or load(config.data, world)))

    def steps(self, count: int = 1) -> None:
        """Make some steps."""
        for _ in range(count):
            prepare_step(self.plan, self.state)
            self.take_step(self.plan, self.state)
            self.state.step += 1

    def sha256(self) -> str:
        """Return the hash of the weights."""
        return checkpoint.tensors_sha256(self.state.module.state_dict())
