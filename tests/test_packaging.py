"""The folders at the root are one import package, wherever and however it is installed."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["search", "spaces", "cost_models", "kernels", "workers", "studies"]
HEAVY = ["torch", "ray", "optuna", "transformers"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_is_a_subpackage_and_not_a_module(folder: str) -> None:
    assert (ROOT / "src" / "apportion" / folder).resolve() == ROOT / folder
    assert importlib.util.find_spec(f"apportion.{folder}") is not None
    bare = importlib.util.find_spec(folder)  # a dependency may own the bare name
    assert bare is None or not str(bare.origin).startswith(str(ROOT))


def test_wheel_holds_every_tracked_file_and_nothing_else(tmp_path: Path) -> None:
    def git(*arguments: str) -> list[str]:
        return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True).split()

    git("checkout-index", "--all", f"--prefix={tmp_path}/tree/")  # a stale build/ must not leak in
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.check_call([*pip, "-w", str(tmp_path), str(tmp_path / "tree")])
    (wheel,) = tmp_path.glob("*.whl")
    built = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = [n.removeprefix("src/apportion/") for n in git("ls-files", *FOLDERS, "src/apportion")]
    assert built == {f"apportion/{name}" for name in tracked if name not in FOLDERS}


@pytest.mark.parametrize("words", [[], ["--help"], ["list"]], ids=["import", "help", "list"])
def test_light_commands_import_no_heavy_library(words: list[str], tmp_path: Path) -> None:
    code = "import apportion.studies.cli; apportion.studies.cli.main()" if words else "pass"
    program = (
        "import apportion, sys\n"
        "try:\n"
        f"    {code}\n"
        "except SystemExit:\n"
        "    pass\n"
        f"print('loaded:', [name for name in {HEAVY} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, *words],
        capture_output=True,
        text=True,
        env={"APPORTION_HOME": str(tmp_path), "PATH": ""},
        check=True,
    )
    assert done.stdout.strip().endswith("loaded: []"), done.stdout + done.stderr
