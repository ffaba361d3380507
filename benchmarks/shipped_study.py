"""Writes a small study of the shipped model, on a recorded device."""

from pathlib import Path

from tiny_study import record

DEMO = Path(__file__).absolute().parent.parent / "examples" / "demo"
STUDY = """
[study]
name = "shipped"
[model]
source = "{demo}/model"
dtype = "float32"
[data]
calibration = "text:{demo}/text/calibration"
search = "text:{demo}/text/search"
heldout = "text:{demo}/text/heldout"
context = 128
tokens = {{ calibration = 8_192, search = 2_048, heldout = 2_048 }}
[objective]
threads = 1
batch = 16
[[space]]
sites = ["*.self_attn.*", "*.mlp.*"]
options = ["dense", "w4g64", "w3g64"]
[[space]]
sites = ["attention:*"]
options = ["keep", "drop"]
[devices.here]
kind = "recorded"
file = "timings.json"
request = [{{ phase = "prefill", batch = 1, tokens = 128 }}]
[limits]
weight_bytes = "1x w4g64"
[search]
solver = "evopress"
tokens = 28_672
windows = 16
offspring = 4
survivors = [2, 1]
stages = [4, 16]
"""


def write(folder: Path) -> Path:
    """Write the study's files into `folder`, which is made; gives the study file."""
    folder.mkdir(parents=True, exist_ok=True)
    study = folder / "study.toml"
    study.write_text(STUDY.lstrip().format(demo=DEMO))
    if not (folder / "timings.json").is_file():
        record(study, folder / "timings.json")
    return study
