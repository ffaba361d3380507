"""The study file that `apportion init` writes: every key, explained."""

import json
import re
from pathlib import Path

from apportion.studies.specification.defaults import (
    CONTEXT,
    EVALUATIONS,
    WEIGHT_OPTIONS,
    WINDOWS,
    physical_cores,
)
from apportion.studies.specification.references import PYTHON, absolute, check_model

TEMPLATE = """\
# Check it with "apportion check {file}", start it with "apportion submit {file}".
# All but [model], [data] and one limit may be left out. Paths are relative to this file.

[study]
name = "{name}"            # a-z, 0-9, ".", "_", "-"; unique in the database
seed = 0                   # of everything that is drawn

[model]
source = "{source}"        # hf:ORG/NAME, a folder, python:package.module:function or python:file.py:function
dtype = "{dtype}"          # float32, bfloat16 or float16: what the dense model computes in
trust_remote_code = false  # true runs code that comes with a hub model

[data]
{data}
[objective]
loss = "kl"                # kl, perplexity, accuracy, or python:file.py:function
threads = 1                # threads of one evaluation
batch = 8                  # windows in one forward pass

# For each site the first entry that names it decides; what none names stays dense.
# "apportion sites {file}" lists the sites; a pattern matches a name, a member's name or kind:name.
[[space]]
sites = ["linear:*", "conv:*"]
options = [{options}]
unfit = "skip"             # leave out what does not fit a site or matches none; "refuse" says so instead

[[space]]
sites = ["attention:*", "mlp:*", "block:*"]
options = ["keep", "drop"]
unfit = "skip"

# A device to be fast on. kind = "cpu" is this machine; kind = "recorded" reads file = "timings.json".
[devices.here]
kind = "cpu"
threads = {threads}                # of the timed model
# latency is the milliseconds of all this work, each item `count` times
{request}

# At least one; all hold at once. An amount, or a share of a uniform configuration:
# "0.5x dense", "0.8x bf16", "1x w4g64".
[limits]
latency.here = "0.5x dense"      # or "900 ms"; latency.worst = "0.5x dense" holds on every device
weight_bytes = "0.5x dense"      # or "1.1 GB": the whole file, embeddings too
# resident_bytes = "1.5 GB"      # what the device holds while running
# bits = "3.5"                   # mean over the sites, scales and zeros included

[search]
solver = "hybrid"          # uniform, greedy, ilp, evopress, optuna:nsga2, optuna:tpe, hybrid
windows = 64               # of the search part, the full slice that the front is judged on
tokens = {budget}         # budget: (configuration, token) pairs, loss table and baselines included
offspring = 16             # candidates in a generation
survivors = [2, 1]         # of each stage of a generation
stages = [8, 64]           # windows that each stage scores on
# start = ["found/4.0.txt"]    # scored first: EvoPress' files, apportion.json, or "owl" (sparsity)
"""  # noqa: E501 (one line for each key)

TEXT_DATA = """\
source = "text:corpus"     # a file or a folder, each file a document; cut into three parts
# calibration = "text:corpus/a"  # or one source for each part, in place of source
# search = "text:corpus/b"
# heldout = "text:corpus/c"
context = {context}              # tokens of a window
tokens = {{ calibration = 131072, search = 65536, heldout = 131072 }}  # at most
"""
PYTHON_DATA = """\
source = "python:data.py:load"   # load(part) -> batches; part: calibration, search, heldout
# calibration = "python:data.py:one"  # or one source for each part, in place of source
# search = "python:data.py:two"
# heldout = "python:data.py:three"
samples = {{ calibration = 512, search = 512, heldout = 2048 }}  # at most
"""
TEXT_REQUEST = """\
request = [
  {{ phase = "prefill", batch = 1, tokens = {context} }},
  {{ phase = "decode", batch = 1, context = {context}, count = 1 }},
]"""
COMMENTED = re.compile(r"^([^#]\S.*?) +(# .*)$")
PYTHON_REQUEST = 'request = [{ phase = "forward", batch = 1, count = 1 }]'


def init_file(source: str, file: str = "study.toml") -> str:
    """A commented study file for the model `source`; the model is not loaded.

    Raises InvalidInput where `source` is no model reference.
    """
    is_python = check_model(source).startswith(PYTHON)
    context = 1 if is_python else _context(source)
    text = TEMPLATE.format(
        file=file,
        name=_name(source),
        source=source,
        dtype="float32" if is_python else "bfloat16",
        options=", ".join(f'"{option}"' for option in WEIGHT_OPTIONS),
        data=(PYTHON_DATA if is_python else TEXT_DATA).format(context=context),
        threads=physical_cores(),
        request=PYTHON_REQUEST if is_python else TEXT_REQUEST.format(context=context),
        budget=EVALUATIONS * WINDOWS * context,
    )
    return "\n".join(COMMENTED.sub(_aligned, line) for line in text.split("\n"))


def _aligned(line: re.Match[str]) -> str:
    return f"{line[1]:<30} {line[2]}"


def _name(source: str) -> str:
    """The model's last name; of a function the file or module that it is in."""
    if source.startswith(PYTHON):
        source = source.rpartition(":")[0].removesuffix(".py").replace(".", "/")
    last = re.split(r"[/:]", source.rstrip("/"))[-1]
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._")[:64] or "study"


def _context(source: str) -> int:
    """The usual window, or all that the model of a local folder can see."""
    config = Path(absolute(source, Path.cwd()).removeprefix("hf:")) / "config.json"
    if not config.is_file():
        return CONTEXT
    most = json.loads(config.read_text(encoding="utf-8")).get("max_position_embeddings")
    return min(CONTEXT, most) if isinstance(most, int) and most > 0 else CONTEXT
