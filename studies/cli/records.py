"""The records that commands print as tables, and with `--json` as they are.

Losses are in the unit of the objective (nats for KL), latencies in milliseconds, sizes in bytes,
shares between 0 and 1. `None` (null) stands for what is not known yet.
"""

from typing import NotRequired, TypedDict


class SiteRow(TypedDict):
    """A site (`sites`)."""

    name: str
    kind: str
    parent: str | None
    layers: int
    weights: int
    options: list[str]
    """Empty for a model without a study file."""
    note: str
    """Why it gets no latency credit, or is not treated; "" where all is well."""


class OperatorCount(TypedDict):
    """How far a device's profile is."""

    operators: int
    measured: int
    seconds: float
    """Expected for those that are not measured."""


class Need(TypedDict):
    """Bytes that are needed and free."""

    needed: int
    free: int
    parts: dict[str, int]


class CheckReport(TypedDict):
    """What a study would do (`check`)."""

    sites: int
    weight_sites: int
    structure_sites: int
    options: int
    fixed_bytes: int
    devices: dict[str, OperatorCount]
    memory: Need
    disk: Need
    search_seconds: float | None
    workers: int
    warnings: list[str]


class StudyRow(TypedDict):
    """A study in the database (`list`)."""

    name: str
    state: str
    """"running", "interrupted", "finished" or "failed"."""
    stage: str | None
    tokens_spent: int
    tokens: int
    unit: str
    """What the budget counts: "tokens" of text, "samples" of anything else."""
    best_loss: float | None
    created: str
    """ISO 8601."""


class BillEntry(TypedDict):
    """Evaluations of one outcome."""

    executions: int
    seconds: float


class Status(StudyRow):
    """How far one study is (`status`)."""

    loss: str
    """Name of the objective: "KL"."""
    workers: int
    recoveries: int
    """Evaluations redone or given up because their worker hung, ate the memory or died."""
    wasted_seconds: float
    """Of workers, on evaluations that gave no result."""
    bill: dict[str, BillEntry]
    """What came of the workers' evaluations -> how many, and their seconds."""
    changes: list[str]
    """What `resume` has changed of the study file."""
    cached: int
    """Evaluations that earlier studies had done."""
    seconds_left: float | None
    """While it searches, as fast as it has searched so far."""


class Latency(TypedDict):
    """Milliseconds of a request on one device."""

    predicted: float
    measured: float | None
    ratio: NotRequired[float | None]
    """Measured, to the dense model in the same run, with its 95 % interval."""
    low: NotRequired[float | None]
    high: NotRequired[float | None]
    dense: NotRequired[float | None]


class Point(TypedDict):
    """A configuration of the front (`show`)."""

    number: int
    """Of its trial."""
    origin: str
    loss_search: float
    loss_heldout: float | None
    loss_error: float | None
    weight_bytes: int
    latency_ms: dict[str, Latency]
    cache_bytes: NotRequired[float]
    """Of keys and values, for each token of context; only where a cache is a site."""
    bits: float
    sparsity: float
    """Share of the remaining sites' weights that is zero."""
    rank: float
    """Mean share of parameters kept by the sites that hold low-rank pairs; 0: none do."""
    width: NotRequired[float]
    """Mean share of heads or channels kept by the sub-blocks that are narrower; 0: none are."""
    dropped: dict[str, int]
    """Kind of structure site -> how many are dropped."""
    resident_bytes: int
    configuration: dict[str, str]
    """Site -> option."""


class Uniform(Point):
    """A uniform configuration, compared with the winner."""

    option: str
    difference: float | None
    """Its held-out loss minus the winner's, paired."""
    standard_error: float | None


class Report(TypedDict):
    """The result of a study (`show`)."""

    study: str
    loss: str
    limits: dict[str, str]
    """Kind -> as written."""
    front: list[Point]
    uniform: list[Uniform]
    winner: int | None
    """Number of the chosen point."""
    rival: str | None
    """Option of the best uniform configuration within the winner's costs."""
    notes: list[str]
    seconds: dict[str, float]
    """Stage -> how long it took."""


class Verification(TypedDict):
    """What an exported folder holds, loaded in a fresh process (`verify`)."""

    ok: bool
    loss: str
    loss_found: float
    loss_promised: float
    loss_difference: float
    weight_bytes: int
    latency_ms: dict[str, Latency]
    reason: NotRequired[str]
    """What is wrong where `ok` is false."""


class Amount(TypedDict):
    """Rows or files of one kind."""

    count: int
    bytes: int
    """Of files their sizes, of rows the lengths of their values."""


class Removal(TypedDict):
    """What was removed for good (`delete`, `gc`)."""

    study: str | None
    """The deleted study; null: what no study needs was collected."""
    dry_run: bool
    """Nothing was removed: this is what would be."""
    removed: dict[str, Amount]
    """Kind -> how much; kinds of which there was nothing are left out."""
    bytes: int
    compacted: int | None
    """Bytes by which the database's file became shorter; null: it was not compacted."""
    left: list[str]
    """What was left alone, and why."""


class DatabaseCheck(TypedDict):
    """Whether a database and its bank are whole (`db check`)."""

    studies: int
    trials: int
    evaluations: int
    entries: int
    """Of the bank, named by studies and whole."""
    problems: list[str]
