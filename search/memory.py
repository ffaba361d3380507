"""What a strategy has computed at some cost, so that a replay need not compute it again."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from apportion.search.problem import Config

Difference = list[list[int]]


class Memory:
    """Values by question, kept with the solver's other answers, and the generator beside them.

    A value is JSON and never None.
    """

    def __init__(self, answers: dict[str, Any], rng: np.random.Generator) -> None:
        """Takes the answers of an earlier run, which are added to in place."""
        self._answers = answers
        self.rng = rng

    def recall(self, question: str, compute: Callable[[], Any]) -> Any:
        """`compute()`, or what it gave when this was first asked.

        Either way random numbers go on as they went on then.
        """
        if question not in self._answers:
            value = compute()
            self._answers[question] = [value, self.rng.bit_generator.state]
        value, self.rng.bit_generator.state = self._answers[question]
        return value


def differences(parent: Config, children: Sequence[Config]) -> list[Difference]:
    """[site, option] wherever a child differs from the parent."""
    return [
        [[site, option] for site, (option, of) in enumerate(zip(child, parent, strict=True))
         if option != of]
        for child in children
    ]  # fmt: skip


def applied(parent: Config, difference: Difference) -> Config:
    """The child again."""
    child = list(parent)
    for site, option in difference:
        child[site] = option
    return tuple(child)
