"""Timing in a process of its own, whose threads are set before torch is imported.

The child reads one JSON job from its first line of input, and writes JSON lines: `progress`,
`record`, and at the end `result` or `error`. It dies with its parent.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from apportion.errors import ApportionError, InvalidInput
from apportion.workers.processes import THREAD_VARIABLES, die_with_parent

if TYPE_CHECKING:
    from torch import nn

    from apportion.spaces.grammar import Option
    from apportion.spaces.sites import Site
    from apportion.workers.spec import Setting, WorkerSpec

Message = dict[str, Any]
Send = Callable[[Message], None]


def run_timing(
    job: Mapping[str, Any],
    threads: int,
    on_message: Send,
    log: Path | None = None,
) -> dict[str, Any]:
    """Run a job in a child process; what `on_message` raises ends the child.

    Args:
        job: `kind` "profile" (`worker`, `request`, `known`, `seed`, and if wanted `struck`,
            `uniforms`, `configurations`) or "compare" (`worker`, `request`, `seconds`, `seed`,
            `configurations`: name -> {`configuration`, `implementations`}).
        threads: intra-op threads, set before torch is imported.
        on_message: is told {"progress": [done, total]} and {"record": {key: measurement}}.
        log: file that takes what the child prints; None: shown only where it fails.

    Returns:
        "profile": `Profile.to_json()`. "compare": name -> `Measurement.to_json()`.

    Raises:
        InvalidInput: the job's model, data or request is wrong.
        ApportionError: the child failed.
    """
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    with tempfile.TemporaryDirectory(prefix="ap-") as neutral, _opened(log) as printed:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "apportion.workers.timing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            cwd=neutral,
            env=environment,
            text=True,
            # A Ctrl-C in the terminal is for the driver, which decides.
            start_new_session=True,
        )
        try:
            return _listen(child, {**job, "threads": threads}, on_message, printed)
        finally:
            child.kill()
            child.communicate()


def _opened(log: Path | None) -> IO[bytes]:
    return tempfile.TemporaryFile() if log is None else log.open("ab+")


def _listen(
    child: "subprocess.Popen[str]", job: Mapping[str, Any], on_message: Send, printed: IO[bytes]
) -> dict[str, Any]:
    if child.stdin is None or child.stdout is None:
        raise ApportionError("the timing process has no pipes")
    try:
        # Left open: its end tells the child that its parent is gone.
        child.stdin.write(json.dumps(job) + "\n")
        child.stdin.flush()
    except BrokenPipeError:
        pass  # It died at once; the end of its output says so below.
    for line in child.stdout:
        message = json.loads(line)
        if "result" in message:
            result: dict[str, Any] = message["result"]
            return result
        if "error" in message:
            error = InvalidInput if message["invalid_input"] else ApportionError
            raise error(message["error"])
        on_message(message)
    code = child.wait()
    printed.seek(0)
    last = printed.read().decode(errors="replace").strip().rpartition("\n")[2]
    raise ApportionError(f"timing ended with exit status {code}: {last}")


def main() -> None:
    """The child: one job, then the end."""
    die_with_parent()
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    # What the user's model prints must not mix with the messages.
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(message: Message) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    try:
        send({"result": _run(job, send)})
    except ApportionError as error:
        send({"error": str(error), "invalid_input": isinstance(error, InvalidInput)})


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


def _run(job: Mapping[str, Any], send: Send) -> dict[str, Any]:
    from apportion.workers.spec import open_setting

    setting = open_setting(job["worker"])
    if job["kind"] == "profile":
        return _profile(job, setting, send)
    return _compare(job, setting)


def _profile(job: Mapping[str, Any], setting: "Setting", send: Send) -> dict[str, Any]:
    from apportion.cost_models.profile import measure_profile
    from apportion.cost_models.requests import RequestItem

    options = {name: job[name] for name in ("configurations",) if name in job}
    profile = measure_profile(
        setting.opened.model,
        setting.space.without(job.get("struck", {})),
        [RequestItem.from_json(item) for item in job["request"]],
        setting.sample,
        threads=job["threads"],
        known=job["known"],
        record=lambda batch: send({"record": batch}),
        seed=job["seed"],
        progress=lambda done, total: send({"progress": [done, total]}),
        uniforms=[tuple(config) for config in job.get("uniforms", [])],
        rank_multiple=job["worker"]["rank_multiple"],
        **options,
    )
    return profile.to_json()


def _compare(job: Mapping[str, Any], setting: "Setting") -> dict[str, Any]:
    from apportion.cost_models.requests import RequestItem
    from apportion.cost_models.whole_model import compare_models

    measured = compare_models(
        {
            name: _builder(job["worker"], setting, entry)
            for name, entry in job["configurations"].items()
        },
        setting.opened.model,
        [RequestItem.from_json(item) for item in job["request"]],
        setting.sample,
        threads=job["threads"],
        seconds=job["seconds"],
        seed=job["seed"],
    )
    return {name: measurement.to_json() for name, measurement in measured.items()}


def _builder(
    spec: "WorkerSpec", setting: "Setting", entry: Mapping[str, Any]
) -> "Callable[[], nn.Module]":
    """Makes the model of one configuration, from the bank's weights."""
    from apportion.spaces.apply import apply
    from apportion.spaces.bank import Bank
    from apportion.spaces.narrowing import shared_copy
    from apportion.workers.spec import read_index

    bank, index = Bank(Path(spec["bank"])), read_index(spec)

    def stored(site: "Site", option: "Option") -> Any:
        return bank.get(index[site.name][str(option)])

    def build() -> "nn.Module":
        model = shared_copy(setting.opened.model)
        chosen, implementations = entry["configuration"], entry["implementations"]
        apply(model, setting.space, chosen, stored, implementations)
        return model

    return build


if __name__ == "__main__":
    main()
