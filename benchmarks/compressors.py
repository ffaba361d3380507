"""Which compressor loses least at equal stored bytes, and do ours agree with published ones?

Formula.     KL(option): the option at every weight site of the shipped model's blocks, mean over
             the demo's held-out windows in nats; SE its standard error, clustered by document.
             Difference = KL(rival) - KL(option), paired over the windows. Bits: 8 x bytes of all
             tensors that store the sites / the number of their dense weights.
             Error of a layer = tr(E M E^T) / tr(W M W^T): E is what a compressor changed of the
             weights W, M the second moment of the layer's inputs in the dense model; told is its
             mean over the layers.
Assumptions. One model, float32, one calibration set of 65,536 tokens, one seed. A rival differs by
             the method alone and has the same bytes, or, where compensation is judged, is without
             it and has no fewer bytes. llm-compressor runs with its own defaults on the same data;
             its pipeline "basic" gives all layers the inputs of the dense model.
Ceiling.     A difference is at most KL(rival).
Verdict.     better: difference > 2 SE; worse: difference < -2 SE; else tied.

Run: .venv/bin/python benchmarks/compressors.py [--page]. An option that the same code has evaluated
is not evaluated again. llm-compressor runs in an environment of its own, build/llmcompressor; the
first run says how to make it. `--page` rewrites the tables in docs/compressors.md.
"""

import argparse
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import llm_compressor
from _report import ROOT, Claim, table, write
from rivals import SIGNIFICANT, verdict
from shipped_options import THREADS, ShippedOptions

from apportion.search.statistics import estimate, paired

PAGE = ROOT / "docs" / "compressors.md"
RIVALS: Mapping[str, str | None] = {
    "w1.58g64": None,
    "w2g64": None, "w2g64:hqq": "w2g64", "w2g64:gptq": "w2g64",
    "w2g32": None, "w2g64+r3": "w2g32",
    "w3": None, "w3:gptq": "w3",
    "w3g64": None, "w3g64:hqq": "w3g64", "w3g64:gptq": "w3g64",
    "w2g64+r7": "w3g64", "w2g64+r7:svd": "w3g64",
    "w3g32": None, "w3g64+r3": "w3g32",
    "w4": None, "w4:gptq": "w4",
    "w4g64": None, "w4g64:hqq": "w4g64", "w4g64:gptq": "w4g64", "w3g64+r7": "w4g64",
    "w5g64": None, "w6g64": None,
    "s60%:magnitude": None, "s60%": "s60%:magnitude", "s60%:sparsegpt": "s60%",
    "s50%:magnitude": None, "s50%": "s50%:magnitude", "s50%:sparsegpt": "s50%",
    "2:4:magnitude": None, "2:4": "2:4:magnitude", "2:4:sparsegpt": "2:4",
    "s53.4%": None, "s60%+r16": "s53.4%", "s60%+r16:svd": "s53.4%",
    "s53.4%:sparsegpt": None, "s60%:sparsegpt+r16": "s53.4%:sparsegpt",
    "r50%:svd": None, "r50%": "r50%:svd",
}  # fmt: skip
"""Every option that is evaluated, and the one that it is compared with or None."""
SENTENCES = {
    "GPTQ beats RTN": ("w3:gptq", "w3g64:gptq"),
    "SparseGPT beats Wanda": ("s60%:sparsegpt",),
    "Wanda beats magnitude": ("s60%",),
    "whitened SVD beats SVD": ("r50%",),
    "compensation pays": (
        *("w2g64+r3", "w2g64+r7", "w3g64+r3", "w3g64+r7"),
        *("s60%+r16", "s60%:sparsegpt+r16"),
    ),
}
"""What is claimed, and of which options against their rivals."""
COLUMNS = (
    "option",
    "bits",
    "layer error",
    "KL",
    "compared with",
    "its bits",
    "difference",
    "verdict",
)
Row = dict[str, Any]


def options() -> list[Row]:
    """A row for each option, and what llm-compressor makes of the same layers."""
    shipped = ShippedOptions(RIVALS)
    found: dict[str, Row] = {}
    for place, option in enumerate(RIVALS, 1):
        found[option] = shipped.row(option)
        print(f" {place} of {len(RIVALS)} options: {option}", flush=True)
    told = [row(found[option], found.get(rival or ""), shipped) for option, rival in RIVALS.items()]
    theirs = llm_compressor.their_layers(shipped.source, shipped.revision, shipped.tokens)
    return told + llm_compressor.rows(theirs, shipped.dense, shipped.moments)


def row(one: Row, rival: Row | None, shipped: ShippedOptions) -> Row:
    """An option's losses as a mean, and the rival's less these; for the results."""
    mine = one["losses"], one["weights"]
    loss = estimate(*mine, shipped.documents)
    named = {key: one[key] for key in ("option", "bytes", "bits", "layer_errors")}
    told = {"kind": "option", **named, "loss_heldout": loss.mean, "standard_error": loss.error}
    if rival is None:
        return told
    gain = paired(rival["losses"], rival["weights"], *mine, shipped.documents)
    return told | {
        "rival": rival["option"],
        "rival_bytes": rival["bytes"],
        "rival_bits": rival["bits"],
        "difference": gain.mean,
        "difference_error": gain.error,
        "verdict": verdict(gain.mean, gain.error),
    }


def claims(rows: Sequence[Row]) -> list[Claim]:
    """What is said of the methods, each option against its rival."""
    found = {each["option"]: each for each in rows if each["kind"] == "option"}
    made = list[Claim]()
    for sentence, judged in SENTENCES.items():
        for one in (found[option] for option in judged):
            name = f"{sentence}: held-out KL, {one['rival']} - {one['option']}"
            bound = f"> {SIGNIFICANT * one['difference_error']:.4g} (2 SE)"
            holds = one["verdict"] == "better"
            made.append(Claim(name, one["difference"], "nats", bound, holds))
    return made


def cells(one: Row) -> list[str]:
    """A row as text, in the order of COLUMNS."""
    told = [
        f"`{one['option']}`",
        f"{one['bits']:.3f}",
        f"{fmean(one['layer_errors'].values()):.3g}",
        f"{one['loss_heldout']:.3g} ± {one['standard_error']:.2g}",
    ]
    if "rival" not in one:
        return told + [""] * (len(COLUMNS) - len(told))
    difference = f"{one['difference']:+.2g} ± {one['difference_error']:.2g}"
    return [*told, f"`{one['rival']}`", f"{one['rival_bits']:.3f}", difference, one["verdict"]]


def tables(rows: Sequence[Row]) -> dict[str, tuple[Sequence[str], list[list[str]]]]:
    """Columns and cells of each table of the page, by the name of its marks."""
    own = [cells(each) for each in rows if each["kind"] == "option"]
    theirs = [llm_compressor.cells(each) for each in rows if each["kind"] == "llm-compressor"]
    return {"options": (COLUMNS, own), "llm-compressor": (llm_compressor.COLUMNS, theirs)}


def page(text: str, rows: Sequence[Row]) -> str:
    """The page's text with the tables put between their marks."""
    for name, (columns, told) in tables(rows).items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not begin or not end:
            raise SystemExit(f"{PAGE}: no line <!-- {name} --> with a line <!-- /{name} --> below")
        lines = [f"| {' | '.join(line)} |\n" for line in (columns, ["---"] * len(columns), *told)]
        text = f"{before}{begin}{''.join(lines)}{end}{after}"
    return text


def main() -> None:
    """Evaluate what is missing, print the tables, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", action="store_true", help="rewrite the tables in the page")
    wanted = parser.parse_args()
    rows = options()
    for columns, told in tables(rows).values():
        table(columns, told)
    write("compressors", THREADS, rows, claims(rows) + llm_compressor.claims(rows))
    if wanted.page:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
