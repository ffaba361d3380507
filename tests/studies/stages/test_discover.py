"""What a space has to hold for there to be anything to search."""

import pytest

from apportion.errors import InvalidInput
from apportion.spaces.grammar import parse_option
from apportion.spaces.sites import Site
from apportion.spaces.space import Space
from apportion.studies.stages.discover import check_choices


def space_of(*texts: str) -> Space:
    return Space((Site("blocks.0.mlp", "mlp"),), (tuple(map(parse_option, texts)),))


def test_space_of_nothing_but_drops_is_one() -> None:
    check_choices(space_of("keep", "drop"))


@pytest.mark.parametrize("space", [Space((), ()), space_of("keep")])
def test_space_without_any_choice_is_refused(space: Space) -> None:
    with pytest.raises(InvalidInput, match="no site of the model has a choice"):
        check_choices(space)
