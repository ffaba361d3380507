"""Joins what `show --json` and `verify --json` printed into one summary.json."""

import json
import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Write summary.json beside show.json and verify.json."""
    shown = json.loads((folder / "show.json").read_text())
    verified = json.loads((folder / "verify.json").read_text())
    winner = next(p for p in shown["front"] if p["number"] == shown["winner"])
    summary = {
        "seconds": round(sum(shown["seconds"].values()), 1),
        "front": shown["front"],
        "uniform": shown["uniform"],
        "winner": winner,
        "limits": shown["limits"],
        "verify": {
            "ok": verified["ok"],
            "loss_difference": verified["loss_difference"],
            "latency_ms": {n: t["measured"] for n, t in verified["latency_ms"].items()},
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f" summary   {folder}/summary.json · {summary['seconds']:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
