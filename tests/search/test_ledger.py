"""The ledger asks nothing twice, spends no more than it has, and knows parts of what it knows."""

import numpy as np
import pytest

from apportion.search.ledger import Ledger
from apportion.search.solver import Proposal, Result, SearchSlice, Settings

SETTINGS = Settings(seed=0, tokens=100, window_tokens=2, windows=16)


def told(ledger, proposals, losses=None):
    """What the ledger asks of `proposals`, after telling it 0, 1, 2, ... for the windows."""
    asked = []
    measuring = ledger.measure(proposals)
    batch = next(measuring, [])
    if batch:
        asked = batch
        values = [np.arange(p.slice.first, p.slice.stop, dtype=float) for p in batch]
        results = losses or [Result(v, np.ones(len(v))) for v in values]
        with pytest.raises(StopIteration):
            measuring.send(results)
    return asked


def test_measure_asks_a_configuration_and_slice_once(synthetic):
    ledger = Ledger(synthetic(0).problem, SETTINGS)
    one = Proposal(ledger.problem.neutral_config, SearchSlice(0, 4), "a")
    assert told(ledger, [one, one]) == [one] and told(ledger, [one]) == []
    assert ledger.spent == 8


def test_measure_makes_configurations_canonical(synthetic):
    ledger = Ledger(synthetic(0).problem, SETTINGS)
    dropped = (1, *ledger.problem.neutral_config[1:])
    raw = (1, 0, 3, *dropped[3:])
    (asked,) = told(ledger, [Proposal(raw, SearchSlice(0, 4), "a")])
    assert asked.config == dropped


def test_measure_stops_at_the_budget(synthetic):
    ledger = Ledger(synthetic(0).problem, SETTINGS)
    configs = [ledger.problem.uniform[f"o{o}"] for o in (1, 2, 3, 4)]
    asked = told(ledger, [Proposal(c, SETTINGS.full, "a") for c in configs])
    assert len(asked) == 3 and ledger.spent == 96 and not ledger.affords(3)


def test_known_holds_for_parts_but_the_full_slice_is_one_trial(synthetic):
    ledger = Ledger(synthetic(0).problem, SETTINGS)
    config = ledger.problem.neutral_config
    halves = [SearchSlice(0, 8), SearchSlice(8, 8)]
    told(ledger, [Proposal(config, part, "a") for part in halves])
    assert ledger.known(config, SearchSlice(6, 4)) and not ledger.known(config, SETTINGS.full)
    assert ledger.mean(config, SearchSlice(6, 4)) == 7.5


@pytest.mark.parametrize(
    "bad", [Result(None, None, "no memory"), Result(np.full(4, np.nan), np.ones(4))]
)
def test_failed_configuration_is_never_asked_again(synthetic, bad):
    ledger = Ledger(synthetic(0).problem, SETTINGS)
    config = ledger.problem.neutral_config
    told(ledger, [Proposal(config, SearchSlice(0, 4), "a")], [bad])
    assert ledger.mean(config) == np.inf and ledger.complete() == []
    assert told(ledger, [Proposal(config, SETTINGS.full, "a")]) == []
