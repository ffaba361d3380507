"""The tables of a study file."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    field_validator,
    model_validator,
)

from apportion.errors import InvalidInput
from apportion.spaces.grammar import parse_option
from apportion.spaces.unrealized import unrealized
from apportion.studies.specification.references import (
    PYTHON,
    TEXT,
    check_data,
    check_loss,
    check_model,
)

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
DEVICE = re.compile(r"[A-Za-z0-9_-]{1,64}")
PARTS = ("calibration", "search", "heldout")
OWL = "owl"
"""What stands for OWL's allocation among the start configurations."""

Count = Annotated[int, Field(strict=True, ge=1)]
DataReference = Annotated[str, AfterValidator(check_data)]


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def check_option(text: str) -> str:
    """`text`, if it spells an option that this version realizes. Raises InvalidInput."""
    reason = unrealized(parse_option(text))
    if reason is not None:
        raise InvalidInput(reason)
    return text


class Section(BaseModel):
    """A table of the study file: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StudySection(Section):
    """[study]"""

    name: str
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if NAME.fullmatch(name) is None:
            raise InvalidInput(
                f'"{name}" is no name; use a-z, 0-9, ".", "_" and "-", at most 64, '
                "a letter or digit first"
            )
        return name


class ModelSection(Section):
    """[model]"""

    source: Annotated[str, AfterValidator(check_model)]
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: StrictBool = False


class PartSizes(Section):
    """How much each part holds at most: tokens, or samples."""

    calibration: Count | None = None
    search: Count | None = None
    heldout: Count | None = None


class DataSection(Section):
    """[data]: one source for all parts, or one for each."""

    source: DataReference | None = None
    calibration: DataReference | None = None
    search: DataReference | None = None
    heldout: DataReference | None = None
    context: Count | None = None
    tokens: PartSizes | None = None
    samples: PartSizes | None = None

    @property
    def references(self) -> dict[str, str]:
        """ "source", or the three parts, -> reference."""
        given = {key: getattr(self, key) for key in ("source", *PARTS)}
        return {key: text for key, text in given.items() if text is not None}

    @property
    def is_text(self) -> bool:
        """Whether the data are documents that are cut into windows of `context` tokens."""
        return all(text.startswith(TEXT) for text in self.references.values())

    @property
    def unit(self) -> str:
        """What a budget counts."""
        return "tokens" if self.is_text else "samples"

    @model_validator(mode="after")
    def _check_together(self) -> "DataSection":
        problems = []
        given = set(self.references)
        if not given:
            problems.append('.source: missing; write for example source = "text:corpus"')
        elif given != {"source"} and given != set(PARTS):
            problems.append(": give either source, or all of calibration, search and heldout")
        if len({text.startswith(PYTHON) for text in self.references.values()}) > 1:
            problems.append(": all three parts are text:, or all are python:")
        if given and self.is_text and self.samples is not None:
            problems.append(".samples: is for python: sources; the sizes of text are tokens")
        if given and not self.is_text and (self.tokens or self.context):
            key = "tokens" if self.tokens else "context"
            problems.append(f".{key}: is for text: sources; the sizes of python: ones are samples")
        if problems:
            raise InvalidInput("\n".join(problems))
        return self


class ObjectiveSection(Section):
    """[objective]"""

    loss: Annotated[str, AfterValidator(check_loss)] = "kl"
    threads: Count = 1
    """Threads per evaluation."""
    batch: Count = 8
    """Windows per forward pass."""


class SpaceEntry(Section):
    """[[space]]: which options the sites that a pattern names may take.

    `unfit` says what happens at sites that an option does not fit: the file is refused, or the
    option is left out there.
    """

    sites: Annotated[tuple[str, ...], BeforeValidator(_several), Field(min_length=1)]
    options: Annotated[
        tuple[Annotated[str, AfterValidator(check_option)], ...],
        BeforeValidator(_several),
        Field(min_length=1),
    ]
    unfit: Literal["refuse", "skip"] = "refuse"


class RequestEntry(Section):
    """One piece of the work that latency is measured on."""

    phase: Literal["prefill", "decode", "forward"]
    batch: Count = 1
    tokens: Count | None = None
    context: Count | None = None
    count: Count = 1

    @model_validator(mode="after")
    def _check_length(self) -> "RequestEntry":
        needed = {"prefill": "tokens", "decode": "context"}.get(self.phase)
        problems = [
            f".{key}: is not for {self.phase}" + (f"; give {needed}" if needed else "")
            for key in ("tokens", "context")
            if key != needed and getattr(self, key) is not None
        ]
        if needed is not None and getattr(self, needed) is None and not problems:
            problems.append(
                f".{needed}: missing; {self.phase} needs it, for example {needed} = 512"
            )
        if problems:
            raise InvalidInput("\n".join(problems))
        return self


class Device(Section):
    """[devices.NAME]"""

    kind: Literal["cpu", "recorded"] = "cpu"
    threads: Count | None = None
    request: tuple[RequestEntry, ...] = ()
    file: str | None = None
    """The measurements of a recorded device."""

    @model_validator(mode="after")
    def _check_kind(self) -> "Device":
        if self.kind == "recorded" and self.file is None:
            raise InvalidInput('.file: missing; a recorded device needs file = "timings.json"')
        if not self.request:
            raise InvalidInput(
                ".request: missing; say what latency means, for example "
                'request = [{ phase = "prefill", tokens = 512 }]'
            )
        if self.kind == "cpu" and self.file is not None:
            raise InvalidInput('.file: is only for kind = "recorded"')
        return self


class SearchSection(Section):
    """[search]. `windows` is the full search slice, `stages` the windows of each stage."""

    solver: Literal[
        "uniform", "greedy", "ilp", "evopress", "optuna:nsga2", "optuna:tpe", "hybrid"
    ] = "hybrid"
    tokens: Count
    windows: Count
    offspring: Count = 16
    survivors: Annotated[tuple[Count, ...], Field(min_length=1)] = (2, 1)
    stages: Annotated[tuple[Count, ...], Field(min_length=1)]
    start: Annotated[tuple[str, ...], BeforeValidator(_several)] = ()
    """Files of configurations, or `OWL`."""

    @model_validator(mode="after")
    def _check_stages(self) -> "SearchSection":
        problems = []
        if len(self.survivors) != len(self.stages):
            problems.append(
                f".survivors: {len(self.survivors)} numbers for {len(self.stages)} stages; "
                "give one for each"
            )
        if self.survivors[-1] != 1:
            problems.append(f".survivors: the last must be 1, got {self.survivors[-1]}")
        if list(self.survivors) != sorted(self.survivors, reverse=True):
            problems.append(".survivors: must not rise from stage to stage")
        if list(self.stages) != sorted(self.stages):
            problems.append(".stages: must not fall from stage to stage")
        if self.stages[-1] > self.windows:
            problems.append(
                f".stages: {self.stages[-1]} is more than the full search slice, "
                f"windows = {self.windows}"
            )
        if problems:
            raise InvalidInput("\n".join(problems))
        return self
