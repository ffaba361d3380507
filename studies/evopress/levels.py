"""Level configurations of EvoPress and of the GGUF toolkit: a text of lines `MODULE: LEVEL`.

EvoPress writes an integer (bits, or the signed step of a sparsity), the GGUF toolkit the stored
bits and the file that holds them: `2.5625 (2.5625-Q2_K.pth)`. Early versions of EvoPress put
modules that share a level in one line, joined by commas. The order of the lines differs between
the programs and means nothing; the last line may or may not end in a newline.
Sources: IST-DASLab/EvoPress, evo_quant_search.py and evo_prune_search.py; IST-DASLab/
gptq-gguf-toolkit, evopress/evo_quant_search.py and mapper/config_converter.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property

from apportion.errors import InvalidInput
from apportion.studies.evopress.text import lines as lines_of

MODULE = re.compile(r"[\w-]+(?:\.[\w-]+)*")
LEVEL = re.compile(
    r"-[1-9][0-9]{0,8}|(?:0|[1-9][0-9]{0,8})(?:\.[0-9]{0,8}[1-9])?(?:-[A-Za-z0-9_]+)?"
)
_VALUE = re.compile(
    r" (?P<number>[+-]?[0-9]{1,9}|[0-9]{1,9}\.[0-9]{1,9})"
    r"(?: \((?P<file>(?P<bits>[0-9]{1,9}(?:\.[0-9]{1,9})?)-[A-Za-z0-9_]+\.pth)\))?"
)
RIGHT = 'write "MODULE: 3" or "MODULE: 2.5625 (2.5625-Q2_K.pth)"'


@dataclass(frozen=True)
class LevelLine:
    """One line: the modules it names and their level.

    Attributes:
        modules: paths of layers; one, but in files of early versions.
        number: the level as it is spelled ("3", "-2", "32.0").
        file: the database's file of this level, where the line names it.
    """

    modules: tuple[str, ...]
    number: str
    file: str | None = None

    @property
    def level(self) -> str:
        """The level as a database names it: its file without `.pth` ("3", "2.5625-Q2_K")."""
        if self.file is not None:
            return self.file.removesuffix(".pth")
        return f"{Decimal(self.number).normalize() + 0:f}"

    def __str__(self) -> str:
        file = "" if self.file is None else f" ({self.file})"
        return f"{','.join(self.modules)}: {self.number}{file}"


@dataclass(frozen=True)
class LevelConfig:
    """The lines of a level configuration; `str` gives the file back to the byte."""

    lines: tuple[LevelLine, ...]
    trailing_newline: bool = False

    @cached_property
    def levels(self) -> dict[str, str]:
        """Module -> level, in the order of the file."""
        return {module: line.level for line in self.lines for module in line.modules}

    def __str__(self) -> str:
        return "\n".join(map(str, self.lines)) + "\n" * self.trailing_newline


def level_line(module: str, level: str) -> LevelLine:
    """The line that the program of this kind of level writes for one module."""
    bits, dash, _ = level.partition("-")
    if not (bits and dash):
        return LevelLine((module,), level)
    number = bits if "." in bits else f"{bits}.0"  # the GGUF toolkit prints a float
    return LevelLine((module,), number, f"{level}.pth")


def parse_levels(text: str, where: str) -> LevelConfig:
    """The level configuration that `text` spells; `str` of it is `text`.

    Args:
        text: the content of the file.
        where: the file, for messages.

    Raises:
        InvalidInput: a line is malformed or names a module again; tells the line.
    """
    texts, trailing_newline = lines_of(text, where)
    found = []
    named: dict[str, int] = {}
    for number, line_text in enumerate(texts, 1):
        line = _parse_line(line_text, f"{where}, line {number}")
        for module in line.modules:
            if module in named:
                raise InvalidInput(
                    f"{where}, line {number}: {module} has a level already, in line "
                    f"{named[module]}; a module is named once"
                )
            named[module] = number
        found.append(line)
    return LevelConfig(tuple(found), trailing_newline)


def _parse_line(text: str, where: str) -> LevelLine:
    names, *values = text.split(":")
    if len(values) != 1:
        count = "no colon" if not values else f"{len(values)} colons"
        raise InvalidInput(f'{where}: "{text}" has {count}; {RIGHT}')
    modules = tuple(names.split(","))
    _check_names(modules, where)
    match = _VALUE.fullmatch(values[0])
    if match is None:
        raise InvalidInput(f'{where}: "{text}" has no level after its colon and a space; {RIGHT}')
    if match["file"] is not None and Decimal(match["bits"]) != Decimal(match["number"]):
        raise InvalidInput(
            f"{where}: level {match['number']} does not go with {match['file']}, whose level is "
            f"{match['bits']}"
        )
    return LevelLine(modules, match["number"], match["file"])


def _check_names(modules: Sequence[str], where: str) -> None:
    for module in modules:
        if MODULE.fullmatch(module) is None:
            raise InvalidInput(
                f'{where}: "{module}" is no path of a layer such as model.layers.0.mlp.up_proj'
            )
