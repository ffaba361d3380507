"""What a space has to hold to be searched, and to be what it was when a study is resumed."""

from types import SimpleNamespace

import pytest

from apportion.errors import InvalidInput
from apportion.kernels.formats import LayerShape
from apportion.spaces.folding import Norm
from apportion.spaces.grammar import parse_option
from apportion.spaces.sites import Member, Site
from apportion.spaces.space import Space
from apportion.studies.stages.discover import Changed, check_choices, check_norms


def space_of(*texts: str) -> Space:
    return Space((Site("blocks.0.mlp", "mlp"),), (tuple(map(parse_option, texts)),))


def test_space_of_nothing_but_drops_is_one() -> None:
    check_choices(space_of("keep", "drop"))


@pytest.mark.parametrize("space", [Space((), ()), space_of("keep")])
def test_space_without_any_choice_is_refused(space: Space) -> None:
    with pytest.raises(InvalidInput, match="no site of the model has a choice"):
        check_choices(space)


NORM = Norm("blocks.0.norm", ("weight",))


def refusal(before: dict[str, str], norm: Norm | None, *texts: str) -> str | None:
    """Why what began with these norms is not resumed, where a site has a norm and these options."""
    member = Member("blocks.0.up", LayerShape(8, 8))
    space = Space(
        (Site("blocks.0.up", "linear", (member,), norm=norm),), (tuple(map(parse_option, texts)),)
    )
    context = SimpleNamespace(setting=SimpleNamespace(space=space))
    try:
        check_norms(context, {"norms": before} if before else {})  # type: ignore[arg-type]
    except Changed as error:
        return str(error)
    return None


def test_resuming_where_no_scales_are_folded_needs_no_norms() -> None:
    assert refusal({}, NORM, "dense", "w4", "w4:gptq") is None
    assert refusal({}, None, "dense", "w4:awq") is None
    assert refusal({"blocks.0.up": "blocks.0.norm"}, NORM, "dense", "w4:awq") is None


@pytest.mark.parametrize(
    ("before", "norm", "place"),
    [({}, NORM, "a norm"), ({"blocks.0.up": "blocks.0.norm"}, None, "the site")],
)
def test_resuming_where_scales_are_stored_elsewhere_by_now_is_refused(
    before: dict[str, str], norm: Norm | None, place: str
) -> None:
    told = f"refused: the scales of awq at blocks.0.up are in {place} by now; submit it under"
    assert told in str(refusal(before, norm, "dense", "w4:awq"))
