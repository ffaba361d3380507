"""What is degenerate about a weight site: dead channels, and inputs that tell little."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from apportion.errors import InvalidInput
from apportion.spaces.apply import member_weight
from apportion.spaces.compressors.compose import InputStatistics, effective_methods
from apportion.spaces.grammar import Option
from apportion.spaces.sites import Site

OF_WHOLE_MOMENT = frozenset({"obs", "gptq", "sparsegpt", "whitened"})
"""Methods that take more of a second moment than its diagonal."""
ONE_DIRECTION = 1e-6  # share of the inputs' energy outside of one direction
# Share of an input's mean square that the others leave; sums of float32 products are exact to 1e-6.
UNPREDICTED = 1e-5
ROWS = 256  # scaled at a time


def check_finite(model: nn.Module, sites: Iterable[Site]) -> None:
    """Refuse weights that nothing can be made of, before any work.

    Raises:
        InvalidInput: a weight of a site holds NaN or infinite values; names it.
    """
    for site in sites:
        for member in (member for group in site.groups for member in group):
            wrong = int((~member_weight(model, member).isfinite()).sum())
            if wrong:
                raise InvalidInput(
                    f"model.source: {wrong} of {member.shape.weights} values of "
                    f"{member.parameter_path} (site {site.name}) are not finite (NaN or infinite); "
                    "mend the model, or leave the site out of the space"
                )


def degeneracy(
    weights: Iterable[Tensor], statistics: InputStatistics | None, options: Sequence[Option]
) -> str | None:
    """What makes a site's compression less than its options promise, in words; None: nothing.

    Args:
        weights: of its members, [out, in].
        statistics: of its inputs; None: nothing is known of them.
        options: what is realized of it. Only what matters to one of them is told.
    """
    found = [_dead_outputs(weights)]
    if statistics is not None and any(option.needs_statistics for option in options):
        methods = {m for o in options for m in effective_methods(o, True).values()}
        found += _odd_inputs(statistics, bool(methods & OF_WHOLE_MOMENT))
    return ", ".join(words for words in found if words) or None


def is_unreached(statistics: InputStatistics | None, options: Sequence[Option]) -> bool:
    """Whether no calibration data entered what an option needs the inputs of."""
    needed = any(option.needs_statistics for option in options)
    return needed and statistics is not None and statistics.tokens == 0


def _dead_outputs(weights: Iterable[Tensor]) -> str | None:
    rows = torch.cat([weight.any(1) for weight in weights])
    dead = len(rows) - int(rows.sum())
    return f"the weights of {dead} of {len(rows)} output channels are all 0" if dead else None


def _odd_inputs(statistics: InputStatistics, whole: bool) -> list[str]:
    """In words; `whole`: some method takes more of the second moment than its diagonal."""
    moment = statistics.second_moment
    live = moment.diagonal() > 0
    count, inputs = int(live.sum()), len(live)
    if statistics.tokens == 0:
        return ["no calibration data entered it"]
    if count == 0:
        return [f"all of its {inputs} inputs were 0 throughout calibration"]
    found = []
    if count < inputs:
        found.append(f"{inputs - count} of {inputs} inputs were 0 throughout calibration")
    if count > 1 and _is_one_direction(moment):
        found.append("its inputs were the same throughout calibration, but for a factor")
    elif whole and statistics.tokens < count:
        found.append(f"calibration gave {statistics.tokens} tokens for {count} inputs")
    elif whole and _is_singular(moment, live):
        found.append("some of its inputs are sums of multiples of others")
    return found


def _is_one_direction(moment: Tensor) -> bool:
    """Whether the eigenvalues of [in, in] are 0 but for one: their squares' sum is their sum's."""
    return bool((moment.norm() / moment.trace()).square() > 1 - ONE_DIRECTION)


def _is_singular(moment: Tensor, live: Tensor) -> bool:
    """Whether the moment [in, in] of the live inputs has no inverse, to float32 precision.

    The squared pivots of a Cholesky factorization, each input scaled to a mean square of 1, are
    what the inputs before it do not predict of it. In float32 and in place: it is the only copy.
    """
    places = live.nonzero()[:, 0]
    scale = moment.diagonal()[places].rsqrt()
    scaled = torch.empty(len(places), len(places))
    for rows in torch.split(torch.arange(len(places)), ROWS):
        part = moment[places[rows]][:, places]
        scaled[rows] = part.mul_(scale).mul_(scale[rows, None]).float()
    failed = torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(scaled, out=(scaled, failed))
    return bool(failed) or bool(scaled.diagonal().square().min() < UNPREDICTED)
