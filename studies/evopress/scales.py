"""What the levels of an EvoPress database mean as options of a layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

from apportion.errors import InvalidInput
from apportion.spaces.grammar import parse_option
from apportion.spaces.sites import Member
from apportion.spaces.space import DENSE

PERCENT_DIGITS = Decimal("1e-9")  # as many as the option grammar takes


class Scale(Protocol):
    """One kind of levels."""

    def options(self, member: Member) -> Mapping[str, str]:
        """Level -> option of this member; no option twice where levels are to be written."""


@dataclass(frozen=True)
class BitLevels:
    """Levels of quantization; a database does not say how its weights were stored, the user does.

    Attributes:
        option_of: level ("3", "2.5625-Q2_K") -> option ("w3g128").

    Raises:
        InvalidInput: an option is malformed, there twice, or of other bits than its level.
    """

    option_of: Mapping[str, str]

    def __post_init__(self) -> None:
        level_of: dict[str, str] = {}
        for level, text in self.option_of.items():
            option = parse_option(text)
            if option.is_structure:
                raise InvalidInput(f'level {level}: "{text}" is no option of weights')
            if level.isdecimal() and int(level) <= 8 and option.bits != int(level):
                raise InvalidInput(f'level {level}: "{text}" does not have {level} bits')
            if level_of.setdefault(text, level) != level:
                raise InvalidInput(
                    f'levels {level_of[text]} and {level} are both "{text}"; give each its own'
                )

    def options(self, member: Member) -> Mapping[str, str]:
        """Level -> option, the same for every member."""
        return self.option_of


@dataclass(frozen=True)
class SparsityLevels:
    """Levels of sparsity: level l removes the share `sparsity` + l x `weights_diff` / weights.

    There are `num_levels` to each side of level 0, fewer where a layer would pass 0 or 100 %.
    Source: IST-DASLab/EvoPress, src/pruner.py; the three numbers are a database's `metadata.pth`.

    Attributes:
        sparsity: share of the weights removed at level 0, between 0 and 1.
        weights_diff: weights from one level to the next.
        num_levels: levels to each side.

    Raises:
        InvalidInput: a number is out of its range.
    """

    sparsity: float
    weights_diff: int
    num_levels: int

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise InvalidInput(f"sparsity {self.sparsity} is not between 0 and 1")
        if self.weights_diff < 1:
            raise InvalidInput(f"weights_diff {self.weights_diff} is below 1")
        if self.num_levels < 0:
            raise InvalidInput(f"num_levels {self.num_levels} is below 0")

    def options(self, member: Member) -> Mapping[str, str]:
        """Level -> `sP%`, P to nine digits, the densest first; a level of 0 % is `dense`.

        A level that removes every weight is left out: no option does.
        """
        base, weights = Decimal(str(self.sparsity)), member.shape.weights
        down = min(int(base * weights / self.weights_diff), self.num_levels)
        up = min(int((1 - base) * weights / self.weights_diff), self.num_levels)
        found = {}
        for level in range(-down, up + 1):
            share = base + Decimal(level * self.weights_diff) / weights
            percent = (100 * share).quantize(PERCENT_DIGITS)
            if percent < 100:
                found[str(level)] = f"s{percent.normalize():f}%" if percent else DENSE
        return found
