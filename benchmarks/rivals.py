"""Is a mixed configuration better than the uniform one that it must not exceed?

For each uniform option u, a study of the shipped model is limited to the bytes and to the latency
of u at every site. Its winner w is fixed on search data; what is told is measured afterwards.

Formula.     d = KL_heldout(u) - KL_heldout(w), a mean over the same windows of held-out
             documents, SE its standard error, clustered by document. Latency ratio = (w / dense) /
             (u / dense), both timed as whole models against dense in one run; its 95 % interval
             joins those of the two ratios as if they were independent.
Assumptions. One model, one machine, one request (prefill of 128 tokens, 2 threads), one seed.
             u is realized by the same compressors as the study's options: what is compared is the
             choice, not the compressor.
Ceiling.     Where u loses next to nothing (bf16, w8, w8a8), d is at most KL_heldout(u) itself:
             there the claim is only that the winner is not worse.
Verdict.     better: d > 2 SE; worse: d < -2 SE; else tied.

Run: .venv/bin/python benchmarks/rivals.py [--readme]. Studies that are finished are not run again;
nothing is timed again by the same code. `--readme` rewrites the table in README.md.
"""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from _report import HOME, ROOT, Claim, at_most, code, table, write

from apportion.studies.cli.display import Display
from apportion.studies.cli.session import Session
from apportion.studies.home import Home
from apportion.studies.progress import FINISHED
from apportion.studies.specification import StudySpec, load
from apportion.studies.study import Study

STUDY_FILE = ROOT / "examples" / "demo" / "study.toml"
README = ROOT / "README.md"
BEGIN, END = "<!-- rivals -->", "<!-- /rivals -->"
DEVICE = "here"
LOSSY = ("w3g64:gptq", "s60%:sparsegpt", "r50%")
NEAR_LOSSLESS = ("bf16", "w8a8", "w8")
SIGNIFICANT = 2.0
COLUMNS = (
    *("option everywhere (u)", "bytes of u", "ms of u", "bytes", "ms", "ms / ms of u"),
    *("KL of u", "KL", "difference", "verdict"),
)
Row = dict[str, Any]


def specification(option: str) -> StudySpec:
    """The demo's study, limited to the bytes and the latency of one uniform option."""
    tables = load(STUDY_FILE).to_json()
    plain = re.sub(r"[^a-z0-9]", "", option)
    tables["study"] |= {"name": f"rival-{plain}-{code('search', 'studies')}"}
    tables["limits"] = {"weight_bytes": f"1x {option}", f"latency.{DEVICE}": f"1x {option}"}
    return StudySpec(**tables)


def finished(spec: StudySpec, home: Home, display: Display) -> Study:
    """The study at its end, whatever was done of it before."""
    study = Study.submit(spec, home=home, display=display)
    if study.status()["state"] != FINISHED:
        study.resume(display=display)
    return study


def row(option: str, study: Study) -> Row:
    """What the study's report says of its winner and of u."""
    report = study.show()
    rival = next(u for u in report["uniform"] if u["option"] == option)
    winner = next(p for p in report["front"] if p["number"] == report["winner"])
    ratio, low, high = compared(winner["latency_ms"][DEVICE], rival["latency_ms"][DEVICE])
    difference, error = (_number(rival[key]) for key in ("difference", "standard_error"))
    return {
        "option": option,
        "rival_bytes": rival["weight_bytes"],
        "rival_ms": rival["latency_ms"][DEVICE]["measured"],
        "weight_bytes": winner["weight_bytes"],
        "latency_ms": winner["latency_ms"][DEVICE]["measured"],
        "latency_ratio": ratio,
        "latency_ratio_low": low,
        "latency_ratio_high": high,
        "rival_loss_heldout": _number(rival["loss_heldout"]),
        "loss_heldout": _number(winner["loss_heldout"]),
        "difference": difference,
        "standard_error": error,
        "verdict": verdict(difference, error),
        "origin": winner["origin"],
        "configuration": winner["configuration"],
        "notes": report["notes"],
        "seconds": report["seconds"],
    }


def compared(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float, float]:
    """Ratio of two latencies that are known as ratios to dense, with its 95 % interval."""
    ratio = one["ratio"] / other["ratio"]
    if one == other:  # the same program, timed once
        return ratio, ratio, ratio
    below, above = (
        math.hypot(
            *(math.log(m[end] / m["ratio"]) for m, end in zip((one, other), ends, strict=True))
        )
        for ends in (("low", "high"), ("high", "low"))
    )
    return ratio, ratio * math.exp(-below), ratio * math.exp(above)


def verdict(difference: float, error: float) -> str:
    """How the winner's held-out loss compares with that of u."""
    if not math.isfinite(difference) or not math.isfinite(error):
        return "unknown"
    if difference > SIGNIFICANT * error:
        return "better"
    return "worse" if difference < -SIGNIFICANT * error else "tied"


def claims(found: Row) -> list[Claim]:
    """Within both limits, and better than u, or not worse where u is near-lossless."""
    option, reach = found["option"], SIGNIFICANT * found["standard_error"]
    size, low = found["weight_bytes"] / found["rival_bytes"], found["latency_ratio_low"]
    lossy = option in LOSSY
    bound = f"> {reach:.4g} (2 SE)" if lossy else f">= {-reach:.4g} (-2 SE)"
    kept = found["verdict"] in (("better",) if lossy else ("better", "tied"))
    return [
        at_most(f"{option}: bytes / bytes of u", size, "x", 1.0),
        at_most(f"{option}: ms / ms of u, low end of 95 % interval", low, "x", 1.0),
        Claim(f"{option}: held-out KL of u - KL", found["difference"], "nats", bound, kept),
    ]


def cells(found: Row) -> list[str]:
    """A row as text, in the order of COLUMNS."""
    interval = f"{found['latency_ratio_low']:.3f} to {found['latency_ratio_high']:.3f}"
    return [
        found["option"],
        f"{found['rival_bytes'] / 1e6:.3f} MB",
        f"{found['rival_ms']:.2f}",
        f"{found['weight_bytes'] / 1e6:.3f} MB",
        f"{found['latency_ms']:.2f}",
        f"{found['latency_ratio']:.3f} ({interval})",
        f"{found['rival_loss_heldout']:.3g}",
        f"{found['loss_heldout']:.3g}",
        f"{found['difference']:+.2g} ± {found['standard_error']:.2g}",
        found["verdict"],
    ]


def rewrite_readme(rows: Sequence[Row]) -> None:
    """Put the table between the two marks of README.md."""
    before, begin, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{README}: no line {BEGIN} with a line {END} below it")
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    README.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def main() -> None:
    """Run the studies, print the table, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    wanted = parser.parse_args()
    specs = {option: specification(option) for option in (*LOSSY, *NEAR_LOSSLESS)}
    threads = next(iter(specs.values())).objective.threads
    # Timings are named by what was timed, not by the code that ran it.
    home = Home.find(HOME / f"rivals-{code('kernels', 'cost_models')}")
    with Session(home, study="rivals").working(threads) as display:
        rows = [row(option, finished(spec, home, display)) for option, spec in specs.items()]
    table(COLUMNS, [cells(found) for found in rows])
    write("rivals", threads, rows, [claim for found in rows for claim in claims(found)])
    if wanted.readme:
        rewrite_readme(rows)


if __name__ == "__main__":
    main()
