"""One entry of the bank made: a site's weights under an option."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from apportion.hashing import content_hash, tensors_hash
from apportion.kernels.formats import DTYPES, StoredWeight
from apportion.spaces.apply import bias_of, member_weight
from apportion.spaces.compressors.compose import realize
from apportion.spaces.compressors.folded import realize_folded
from apportion.spaces.compressors.treatment import realize_treatment
from apportion.spaces.folding import Norm, fold
from apportion.spaces.grammar import Option
from apportion.spaces.parts import folded_norm, treated_site
from apportion.spaces.sites import Site
from apportion.spaces.space import DROP_MEAN
from apportion.spaces.statistics import StatisticsFiles
from apportion.spaces.stored import StoredSite
from apportion.spaces.views import parameter_at


def source_hashes(model: nn.Module, site: Site, options: Sequence[Option]) -> dict[str, str]:
    """Option text -> content hash of what of the model its entry is made from.

    Args:
        model: the dense model.
        site: a weight site of it, or a structure site.
        options: those of the site with entries.
    """
    members = [member for group in site.groups for member in group]
    weights = tensors_hash({m.path: member_weight(model, m) for m in members})
    found: dict[str, str] = {}
    for option in options:
        width = treated_site(site, option).width
        made_from: list[Any] = [weights] if width is None else [weights, width.to_json()]
        if width is not None and option.dimension_percent is not None:
            biases = {c.member.path: bias_of(model, c.member.module) for c in width.cuts}
            made_from.append(tensors_hash({n: b for n, b in biases.items() if b is not None}))
        if (norm := folded_norm(site, option)) is not None:
            vectors = dict(zip(norm.vectors, _vectors(model, norm), strict=True))
            made_from += [norm.offset, list(norm.vectors), tensors_hash(vectors)]
        found[str(option)] = content_hash(made_from) if len(made_from) > 1 else weights
    return found


def _vectors(model: nn.Module, norm: Norm) -> list[Tensor]:
    return [parameter_at(model, path).detach() for path in norm.paths]


def realize_site(
    model: nn.Module,
    site: Site,
    option: Option,
    statistics: StatisticsFiles,
    model_dtype: str,
    rank_multiple: int,
) -> StoredSite:
    """What the bank stores of a site under an option.

    Args:
        model: the dense model.
        site: a weight site of it, or a structure site.
        option: what to do.
        statistics: of the site's inputs, by their names; of a treatment those of its groups, of a
            stack those of each matrix, of `drop:mean` what the site adds, of `taylor` the scores
            of the site's gates.
        model_dtype: dtype of what the option leaves as it is.
        rank_multiple: ranks of rP% are multiples of it.

    Raises:
        InvalidInput: the option is refused, or weights or statistics are not finite.
        OSError, SafetensorError: the statistics are not there or damaged.
    """
    if str(option) == DROP_MEAN:
        return StoredSite((), constant=statistics.added(site.name).mean(DTYPES[model_dtype]))
    weights = [member_weight(model, m).float() for group in site.groups for m in group]
    width = treated_site(site, option).width
    if width is not None and option.narrows:
        found = [statistics.of(name) for name in site.input_names]
        scores = statistics.gates(site.name) if option.needs_gates else None
        biases = None
        if option.dimension_percent is not None:
            biases = [bias_of(model, cut.member.module) for cut in width.cuts]
        return realize_treatment(
            weights, width, option, found, model_dtype, rank_multiple, scores, biases
        )
    if (norm := folded_norm(site, option)) is not None:
        shapes, seen = [member.shape for member in site.members], statistics.of(site.name)
        into = partial(fold, _vectors(model, norm), norm.offset)
        made, vectors = realize_folded(
            weights, shapes, option, seen, into, model_dtype, rank_multiple
        )
        return StoredSite(made, norm=vectors)
    names = [n for n, group in zip(site.input_names, site.groups, strict=True) for _ in group]
    stored = (
        realize(weight, member.shape, option, statistics.of(name), model_dtype, rank_multiple)
        for weight, member, name in zip(weights, site.members, names, strict=True)
    )
    return StoredSite(tuple(stored))


def realize_options(
    model: nn.Module,
    site: Site,
    options: Sequence[Option],
    statistics: StatisticsFiles,
    model_dtype: str,
    rank_multiple: int,
) -> Iterator[StoredSite]:
    """What the bank stores of a site under each of some options; arguments like `realize_site`.

    Of a stack all options are done to a matrix before the next one's turn, so that they share what
    is computed of its statistics; the packed stack is held under all of them.

    Raises:
        InvalidInput, OSError, SafetensorError: like `realize_site`.
    """
    if site.is_structure or len(site.groups) == 1:
        for option in options:
            yield realize_site(model, site, option, statistics, model_dtype, rank_multiple)
        return
    made: list[list[StoredWeight]] = [[] for _ in options]
    for name, (member,) in zip(site.input_names, site.groups, strict=True):
        weight = member_weight(model, member).float()
        for option, stored in zip(options, made, strict=True):
            seen = statistics.of(name)
            stored.append(realize(weight, member.shape, option, seen, model_dtype, rank_multiple))
    for stored in made:
        yield StoredSite(tuple(stored))
