"""What a solver is told of costs: limits in every unit, guarded where they are latencies."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from apportion.cost_models.table import CostTable
from apportion.errors import InvalidInput
from apportion.kernels.formats import LayerShape
from apportion.spaces.grammar import parse_option
from apportion.spaces.sites import Member, Site
from apportion.spaces.space import Space
from apportion.studies.limits import parse_limit
from apportion.studies.pricing import Prices

MARGIN = 0.1


def weight_site(name: str, parent: str) -> Site:
    return Site(name, "linear", (Member(name, LayerShape(4, 4)),), parent)


@pytest.fixture
def prices() -> Prices:
    """A sub-block of two layers; w4 and w3 run the same program, bf16 a faster one than dense."""
    sites = (Site("mlp", "mlp"), weight_site("mlp.up", "mlp"), weight_site("mlp.down", "mlp"))
    weights = tuple(map(parse_option, ("dense", "bf16", "w4", "w3")))
    space = Space(sites, (tuple(map(parse_option, ("keep", "drop"))), weights, weights))
    inf = np.inf
    latency = np.array([[2.0, 0, inf, inf], [5, 4, 3, 3], [5, 4, 3, 3]])
    size = np.array([[10.0, 0, inf, inf], [64, 32, 10, 8], [64, 32, 10, 8]])
    table = CostTable(latency, latency, 1.0, MARGIN)
    return Prices(
        space,
        {"weight_bytes": size, "latency.here": latency},
        {"weight_bytes": 100.0, "latency.here": 1.0},
        {"here": table},
        {"bf16": (0, 1, 1), "w4": (0, 2, 2), "w3": (0, 3, 3)},
    )


def feasible(prices: Prices, **limits: str) -> set[tuple[int, ...]]:
    parsed = [parse_limit(kind.replace("_here", ".here"), text) for kind, text in limits.items()]
    problem = prices.problem(parsed, {})
    configs = {problem.canonical(c) for c in product(range(2), range(4), range(4))}
    return {config for config in configs if problem.feasible(config)}


def test_costs_of_a_dropped_block_are_those_of_the_rest(prices: Prices) -> None:
    assert prices.costs((1, 0, 0)) == {
        "weight_bytes": 100.0,
        "latency.here": 1.0,
        "latency.worst": 1 / 13,
    }


def test_drop_for_a_constant_is_a_drop_to_a_solver() -> None:
    options = tuple(map(parse_option, ("keep", "drop", "drop:mean")))
    space = Space((Site("mlp", "mlp", constant=(8,)),), (options,))
    problem = Prices(space, {"bits": np.zeros((1, 3))}, {"bits": 0.0}, {}, {}).problem([], {})
    assert problem.removes is not None
    assert problem.drops.tolist() == problem.removes.tolist() == [[False, True, True]]


def test_limit_of_its_own_unit_is_met_without_margin(prices: Prices) -> None:
    allowed = feasible(prices, latency_here="1x w4")
    assert {(0, 2, 2), (0, 2, 3), (0, 3, 2), (0, 3, 3), (1, 0, 0)} == allowed


def test_margin_is_charged_on_what_differs(prices: Prices) -> None:
    # bf16 saves 1 ms a layer against dense, of which 1 / 1.1 counts.
    assert (0, 1, 0) in feasible(prices, latency_here=f"{12.2 / 13}x dense")
    assert (0, 1, 0) not in feasible(prices, latency_here=f"{12.05 / 13}x dense")


def test_unit_without_a_method_is_the_first_option_that_differs_by_it_alone(
    prices: Prices,
) -> None:
    methods = {"w4:gptq": (0, 2, 2), "w4:hqq": (0, 3, 3), "w3g4": (0, 1, 1)}
    named = replace(prices, uniform=methods)
    assert named.unit("w4") == named.unit("w4:gptq") == (0, 2, 2)
    assert named.unit("w4:hqq") == (0, 3, 3)
    assert replace(prices, uniform=methods | {"w4": (0, 0, 2)}).unit("w4") == (0, 0, 2)
    for other in ("w3", "w4:awq"):
        with pytest.raises(InvalidInput, match="is no option of this space"):
            named.unit(other)


def test_absolute_limit_is_divided_above_the_base(prices: Prices) -> None:
    assert (0, 2, 2) in feasible(prices, latency_here="9.9 ms")
    assert (0, 2, 2) not in feasible(prices, latency_here="9.6 ms")


def test_worst_and_its_device_both_hold(prices: Prices) -> None:
    limits = [parse_limit("latency.here", "100 ms"), parse_limit("latency.worst", "0.8x dense")]
    problem = prices.problem(limits, {})
    assert not problem.feasible((0, 0, 0))
    assert problem.feasible((0, 2, 2))


def test_tightening_takes_from_what_is_above_the_base(prices: Prices) -> None:
    limit = [parse_limit("weight_bytes", "1x w4")]
    assert prices.problem(limit, {"weight_bytes": 0.5}).limit["weight_bytes"] == 115.0


def test_unknown_unit_names_the_key_and_the_units(prices: Prices) -> None:
    with pytest.raises(InvalidInput, match="limits.weight_bytes: .*units here: dense, bf16, w4"):
        prices.limit_value(parse_limit("weight_bytes", "1x w8"))


def test_limit_on_cache_bytes_without_a_cache_says_what_to_add(prices: Prices) -> None:
    with pytest.raises(InvalidInput, match=r'limits.cache_bytes: .*sites = "cache:\*"'):
        prices.problem([parse_limit("cache_bytes", "0.5x dense")], {})
