"""Drop configurations of EvoPress: a text with one word for each block of the model.

Source: IST-DASLab/EvoPress, evo_drop_search.py writes `layer_drop_config.txt` with a newline at
its end; src/model_utils.py reads it, needs a line for each block, and takes `attn+mlp` for a block
that returns its input.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from apportion.errors import InvalidInput
from apportion.spaces.sites import Site
from apportion.spaces.space import DROP, Configuration
from apportion.studies.evopress.text import lines

PARTS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "attn": ("attention",),
    "mlp": ("mlp",),
    "attn+mlp": ("attention", "mlp"),
}
"""Word -> kinds of the sub-blocks that are dropped."""


@dataclass(frozen=True)
class DropConfig:
    """One word of `PARTS` for each block; `str` gives the file back to the byte."""

    words: tuple[str, ...]
    trailing_newline: bool = True

    def __str__(self) -> str:
        return "\n".join(self.words) + "\n" * self.trailing_newline


def parse_drops(text: str, where: str) -> DropConfig:
    """The drop configuration that `text` spells; `str` of it is `text`.

    Args:
        text: the content of the file.
        where: the file, for messages.

    Raises:
        InvalidInput: a line is no word of `PARTS`; tells the line.
    """
    words, trailing_newline = lines(text, where)
    for number, word in enumerate(words, 1):
        if word not in PARTS:
            raise InvalidInput(f'{where}, line {number}: "{word}" is not one of {", ".join(PARTS)}')
    return DropConfig(tuple(words), trailing_newline)


def drops_to_configuration(config: DropConfig, sites: Iterable[Site]) -> Configuration:
    """Structure site -> `drop`, for what the drop configuration removes; all others are kept.

    `attn+mlp` drops both sub-blocks, or the block where `sites` holds none of its sub-blocks.

    Args:
        config: one word for each block.
        sites: holds every block of the model, in their order.

    Raises:
        InvalidInput: another number of blocks, or a block without the sub-block to drop.
    """
    blocks = _blocks(sites)
    if len(config.words) != len(blocks):
        raise InvalidInput(
            f"the drop configuration has {len(config.words)} lines, the model {len(blocks)} "
            "blocks; it needs one line for each block"
        )
    dropped: Configuration = {}
    for (block, below), word in zip(blocks.items(), config.words, strict=True):
        if word == "attn+mlp" and not below:
            dropped[block] = DROP
        else:
            dropped |= {_only(below, kind, block).name: DROP for kind in PARTS[word]}
    return dropped


def configuration_to_drops(configuration: Mapping[str, str], sites: Iterable[Site]) -> DropConfig:
    """One word for each block, in the order of the sites.

    Args:
        configuration: site -> option; those of weight sites are not looked at.
        sites: holds every block of the model, in their order.

    Raises:
        InvalidInput: there is no block, or a dropped site is neither a block nor the one
            attention or MLP of a block.
    """
    blocks = _blocks(sites)
    if not blocks:
        raise InvalidInput("the model has no blocks; a drop configuration is a list of blocks")
    dropped = {name for name, option in configuration.items() if option == DROP}
    told = set(blocks) | {site.name for below in blocks.values() for site in below}
    if dropped - told:
        raise InvalidInput(f"{min(dropped - told)} is no block, attention or MLP of a block")
    return DropConfig(tuple(_word(block, below, dropped) for block, below in blocks.items()))


def _blocks(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """Block -> its sub-blocks."""
    structures = [site for site in sites if site.is_structure]
    return {
        block.name: [site for site in structures if site.parent == block.name]
        for block in structures
        if block.kind == "block"
    }


def _word(block: str, below: Sequence[Site], dropped: set[str]) -> str:
    if block in dropped:
        return "attn+mlp"
    kinds = {site.kind for site in below if site.name in dropped}
    for kind in kinds:
        _only(below, kind, block)
    return next(word for word, parts in PARTS.items() if set(parts) == kinds)


def _only(below: Sequence[Site], kind: str, block: str) -> Site:
    found = [site for site in below if site.kind == kind]
    if len(found) != 1:
        raise InvalidInput(
            f"{block} has {len(found)} {kind} sub-blocks; a drop configuration means the only one"
        )
    return found[0]
