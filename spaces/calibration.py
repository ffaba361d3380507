"""One pass over calibration data: what every compressor needs to know of a layer's inputs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apportion.errors import InvalidInput
from apportion.spaces.added import Added, adding
from apportion.spaces.batches import Batch, call
from apportion.spaces.compressors.compose import InputStatistics
from apportion.spaces.products import Factor, Watch, Whereabouts
from apportion.spaces.routing import routed
from apportion.spaces.sites import Member, Site
from apportion.spaces.uses import takes_input
from apportion.spaces.views import parameter_at

Sums = dict[str, InputStatistics | Added]
SLICE = 256


def _is_seen(site: Site) -> bool:
    """Whether what enters it can be watched, and is one matrix of inputs: not in groups."""
    if site.is_structure or site.unseen is not None:
        return False
    conv = site.members[0].shape.conv
    return conv is None or conv.groups == 1


def _rows(layer_input: Tensor, member: Member) -> Tensor:
    """A layer's input as rows `[n, in]`."""
    conv = member.shape.conv
    if conv is None:
        return layer_input.reshape(-1, layer_input.shape[-1])
    patches = F.unfold(
        layer_input.float(), conv.kernel, conv.dilation, conv.padding, conv.stride
    )  # [batch, in, positions]
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _accumulate(
    member: Member, seen: InputStatistics
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def add(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = args[0] if args else keywords["input"]
        # Of a packed sequence the data are its tokens.
        _add(_rows(given.data, member), seen)

    return add


def _add(rows: Tensor, seen: InputStatistics) -> None:
    """Add inputs `[n, in]` to what was seen."""
    rows = rows.float()
    product = rows.T @ rows
    # Adding float32 to float64 makes a float64 copy: of a slice, it is small.
    for first in range(0, len(product), SLICE):
        seen.second_moment[first : first + SLICE] += product[first : first + SLICE]
    if seen.peak is not None and len(rows):
        torch.maximum(seen.peak, torch.linalg.vector_norm(rows, torch.inf, 0), out=seen.peak)
    seen.tokens += rows.shape[0]


def _watch(model: nn.Module, sites: Iterable[Site], sums: dict[str, InputStatistics]) -> Watch:
    """What adds to `sums` the inputs of matrices that no module is given the inputs of."""
    parameters: dict[str, Tensor] = {}
    found: dict[tuple[str, int], tuple[Member, InputStatistics]] = {}
    for site in sites:
        for name, member in zip(site.input_names, site.members, strict=True):
            path = member.parameter_path
            parameters[path] = parameter_at(model, path)
            found[path, member.index or 0] = member, sums[name]

    def note(path: str, factor: Factor, whereabouts: Whereabouts) -> None:
        places = whereabouts.places(factor.tensor)
        transposed = whereabouts.is_flipped(path, factor.tensor) == factor.inputs_last
        for place, rows in () if places is None else factor.rows(places):
            member, seen = found.get((path, place), (None, None))
            if member is not None and seen is not None and member.transposed == transposed:
                _add(rows, seen)

    return Watch(parameters, note)


def seen_in_products(model: nn.Module, sites: Iterable[Site]) -> list[Site]:
    """Those of whose inputs no module is given all and no more."""
    written = [site for site in sites if _is_seen(site) and site.written_back]
    firsts = [site.members[0] for site in written]
    pairs = zip(written, firsts, strict=True)
    return [s for s, m in pairs if not takes_input(model.get_submodule(m.module), m.parameter)]


def _nothing(inputs: int) -> InputStatistics:
    moment = torch.zeros(inputs, inputs, dtype=torch.float64)
    return InputStatistics(moment, 0, torch.zeros(inputs, dtype=torch.float32))


@contextmanager
def watched(model: nn.Module, sites: Iterable[Site]) -> Iterator[dict[str, InputStatistics]]:
    """Sum what enters the weight sites among `sites`, in every pass that is made meanwhile.

    What a matrix that is written back is multiplied with is seen where it is multiplied, of each
    matrix of a stack by itself, unless `Site.unseen` says why not. What enters a grouped
    convolution is no single matrix.

    Gives, for each of the others by `Site.input_names`, the float64 sum `[in, in]` of its float32
    products and the largest value `[in]` of each input: zeros where no token came by.

    Raises:
        InvalidInput: at the end, inputs that are not finite.
    """
    seen = [site for site in sites if _is_seen(site)]
    sums = {
        name: _nothing(group[0].shape.in_features)
        for site in seen
        for name, group in zip(site.input_names, site.groups, strict=True)
    }
    in_products = seen_in_products(model, seen)
    with ExitStack() as undo:
        for site in seen:
            if site not in in_products:
                member = site.members[0]
                add = _accumulate(member, sums[site.name])
                module = model.get_submodule(member.module)
                undo.callback(module.register_forward_pre_hook(add, with_kwargs=True).remove)
        if in_products:
            undo.enter_context(_watch(model, in_products, sums))
        yield sums
    for name, statistics in sums.items():
        if not bool(torch.isfinite(statistics.second_moment).all()):
            raise InvalidInput(f"data.calibration: the inputs of site {name} are not finite")


@torch.no_grad()
def collect(
    model: nn.Module,
    sites: Iterable[Site],
    batches: Iterable[Batch],
    progress: Callable[[int], None] = lambda done: None,
    added: Iterable[Site] = (),
) -> Sums:
    """Second moments, summed in float64, and peaks of each weight site's input, all at once.

    Args:
        model: the dense model.
        sites: the weight sites among them are watched; members of a group share one input.
        batches: calibration data.
        progress: told how many batches are done.
        added: structure sites of which is summed what they add.

    Raises:
        InvalidInput: no data, or inputs that are not finite.
    """
    done = 0
    sites = list(sites)
    # What is sent to experts first: where it runs something once more, nobody else is to see it.
    seen = routed(model, sites), watched(model, sites), adding(model, added)
    with seen[0] as sent, seen[1] as sums, seen[2] as extra:
        for done, batch in enumerate(batches, 1):
            call(model, batch)
            progress(done)
    if done == 0:
        raise InvalidInput("data.calibration: there is no calibration data")
    return {**sent, **sums, **extra}
