"""Export: the winner, or another point of the front, as a native artifact."""

from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from apportion import __version__
from apportion.errors import InvalidInput
from apportion.spaces.artifact import Plan, write
from apportion.spaces.bank import Bank
from apportion.spaces.grammar import Option
from apportion.spaces.sites import Site
from apportion.spaces.space import Space
from apportion.spaces.stored import Stored, StoredSite
from apportion.studies.cli.display import QuietDisplay
from apportion.studies.context import Context, Output, worker_spec
from apportion.studies.database.rows import Lease
from apportion.studies.database.store import Store
from apportion.studies.home import Home
from apportion.studies.specification import StudySpec
from apportion.studies.stages import discover, profile
from apportion.workers.sources import OpenedModel


@dataclass(frozen=True)
class Chosen:
    """A point of a finished study's front, with all that it is made of.

    Attributes:
        context: with the model, as it was when the study began.
        space: what the solver could choose from.
        profiled: output of the stage `profile`.
        point: of the report.
        stored: gives the packed weights of a site's members under an option of the space.
    """

    context: Context
    space: Space
    profiled: Output
    point: dict[str, Any]
    stored: Stored


def choose(
    spec: StudySpec,
    home: Home,
    store: Store,
    study_id: int,
    report: Output,
    folder: Path,
    trial: int | None,
) -> Chosen:
    """The winner, or the point of trial `trial`, to be written into the new folder `folder`.

    Raises:
        InvalidInput: the study is not finished, the folder exists, the trial is no point of the
            front, or the model has changed.
    """
    profiled = store.stage_output(study_id, "profile")
    compressed = store.stage_output(study_id, "compress")
    found = store.stage_output(study_id, "discover")
    if profiled is None or compressed is None or found is None:
        raise InvalidInput(f'study "{spec.study.name}" is not finished; there is nothing to export')
    point = _point(report, trial)
    if folder.exists():
        raise InvalidInput(f"{folder} exists already; choose another folder or remove it")
    # Reading needs no lease: nothing is written to the study.
    lease = Lease(study_id, 0, 0.0)
    context = Context(spec, home, store, study_id, lease, QuietDisplay(), Event())
    discover.check_unchanged(context, found)
    bank, index = Bank(home.bank), compressed["index"]

    def stored(site: Site, option: Option) -> StoredSite:
        return bank.get(index[site.name][str(option)])

    space = context.setting.space.without(profiled["struck"])
    return Chosen(context, space, profiled, point, stored)


def export(chosen: Chosen, report: Output, folder: Path) -> None:
    """Write a point of a finished study's front as a native artifact."""
    context, point = chosen.context, chosen.point
    implementations = profile.implementations(chosen.profiled)
    plan = Plan(chosen.space, point["configuration"], chosen.stored, implementations)
    source = {
        "kind": "hf" if context.opened.is_causal_lm else "python",
        "source": context.opened.source,
        "revision": context.opened.revision,
        "dtype": context.spec.model.dtype,
    }
    described = _report(context.spec, context.home, point, report, chosen.profiled)
    write(folder, context.model, plan, source, described, lambda to: _extra(context.opened, to))


def _point(report: dict[str, Any], trial: int | None) -> dict[str, Any]:
    wanted = report["winner"] if trial is None else trial
    points = [*report["front"], *report["uniform"]]
    for point in points:
        if point["number"] == wanted:
            return dict(point)
    numbers = ", ".join(str(p["number"]) for p in points)
    raise InvalidInput(f"trial {wanted} is no point of the front; points: {numbers}")


def _report(
    spec: StudySpec,
    home: Home,
    point: dict[str, Any],
    report: dict[str, Any],
    profiled: dict[str, Any],
) -> dict[str, Any]:
    """What was promised, and all that is needed to check it in another process."""
    devices = {
        name: {
            "kind": device.kind,
            "threads": device.threads,
            "request": profile.request_of(device),
            "fingerprint": profiled["profiles"][name]["fingerprint"],
        }
        for name, device in spec.devices.items()
    }
    return {
        "apportion": __version__,
        "study": spec.study.name,
        "seed": spec.study.seed,
        "objective": spec.objective.loss,
        "point": point,
        "is_winner": point["number"] == report["winner"],
        "limits": report["limits"],
        "notes": report["notes"],
        "clustered_by": report["clustered_by"],
        "devices": devices,
        "evaluation": worker_spec(spec, home),
    }


def _extra(opened: OpenedModel, folder: Path) -> None:
    """A Hugging Face model's configuration, generation and tokenizer files."""
    if not opened.is_causal_lm:
        return
    model: Any = opened.model
    model.config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    if opened.tokenizer is not None:
        opened.tokenizer.save_pretrained(folder)
