"""The first minute: what `make demo` installs on which machine, and the package as a wheel of its own, away from the
checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from .tiny import write_talker

ROOT = Path(__file__).resolve().parent.parent

# --- make demo

DRIVER = """
extern "C" int cuInit(unsigned) { return INIT; }
extern "C" int cuDriverGetVersion(int* version) { *version = VERSION; return 0; }
extern "C" int cuDeviceGetCount(int* count) { *count = DEVICES; return 0; }
"""


def demo(folder: Path, *variables: str, version: int = 13000, devices: int = 1, init: int = 0) -> tuple[str, str]:
    """What `make demo` would run on a machine with this driver, and what it says of it."""
    (folder / "driver.cpp").write_text(DRIVER)
    values = f"-DVERSION={version}", f"-DDEVICES={devices}", f"-DINIT={init}"
    subprocess.run(["g++", "-shared", "-fPIC", *values, "driver.cpp", "-o", "libcuda.so.1"], cwd=folder, check=True)
    make = ["make", "-n", "demo", f"VENV={folder}/venv", f"PYTHON={sys.executable}", *variables]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment["LD_LIBRARY_PATH"] = str(folder)
    done = subprocess.run(make, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


needs_make = pytest.mark.skipif(
    not (shutil.which("make") and shutil.which("g++")), reason="needs make and g++ (a stand-in for the driver)"
)


@needs_make
@pytest.mark.parametrize(
    ("version", "extra"), [(12000, "cuda12"), (12080, "cuda12"), (13000, "cuda13"), (14010, "cuda13")]
)
def test_a_machine_with_a_driver_gets_the_extra_of_its_version(version, extra, tmp_path):
    commands, said = demo(tmp_path, version=version)
    assert f"install -q --disable-pip-version-check -e '.[gguf,{extra}]'" in commands and said == ""
    assert commands.index(
        f"cuda_extra.py {extra}"
    ) < commands.index("pip install") < commands.index("minioscar generate")
    assert "--device auto" in commands


@needs_make
@pytest.mark.parametrize(
    ("driver", "why"),
    [
        ({"init": 100}, ""), ({"devices": 0}, ""),
        ({"init": 999}, "does not work (CUDA error 999); going on without the GPU"),
        ({"version": 11040}, "has CUDA 11.4, and CuPy needs 12 or newer"),
    ],
)  # fmt: skip
def test_without_a_gpu_that_works_all_stays_as_it_was(driver, why, tmp_path):
    commands, said = demo(tmp_path, **driver)
    assert "-e '.[gguf]'" in commands and "cuda1" not in commands
    assert why in said and said.count("\n") == bool(why)


@needs_make
def test_who_wants_the_cpu_gets_nothing_of_cuda(tmp_path):
    commands, said = demo(tmp_path, "DEVICE=cpu", init=999)
    assert "-e '.[gguf]'" in commands and "--device cpu" in commands and said == ""


@pytest.mark.parametrize("extra", ["cuda12", "cuda13"])
def test_what_is_installed_is_said_with_its_size(extra):
    command = [sys.executable, ROOT / "tools" / "cuda_extra.py", extra]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.count("\n") == 1 and extra in said and " MB on disk" in said and "DEVICE=cpu" in said


# --- a wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as `python -m build` does, from a copy that has nothing of an earlier build."""
    if not find_spec("build") or int(version("setuptools").split(".")[0]) < 71:
        pytest.skip("build or a setuptools that makes wheels is not installed: pip install 'minioscar[test]'")
    folder = tmp_path_factory.mktemp("checkout") / "minioscar"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "weights", "figures")
    shutil.copytree(ROOT, folder, ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder.parent / "dist"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next((folder.parent / "dist").glob("*.whl"))


def test_a_wheel_has_the_whole_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = (path for path in (ROOT / "minioscar").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert names == {str(path.relative_to(ROOT)) for path in package}
    assert {"minioscar/py.typed", "minioscar/kernels/common.cuh", "minioscar/kernels/sm90/linear_batch.cu"} <= names


EVERY_MODULE = """
import importlib, pkgutil, sys, minioscar
for module in pkgutil.walk_packages(minioscar.__path__, "minioscar."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert error.name.split(".")[0] == "ray", module.name  # an extra that the tests do without
print(minioscar.__file__)
assert not {"tests", "benchmarks", "tools", "docs"} & {name.split(".")[0] for name in sys.modules}
"""


def test_a_wheel_in_a_clean_environment_generates_a_token(wheel, tmp_path):
    """Libraries are those that are here; the package is the wheel's, and nothing of the checkout can be seen."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = [
        sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", "--no-compile",
        str(wheel)
    ]
    subprocess.run(install, check=True, capture_output=True)
    site = Path(
        sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")})
    )
    libraries = {
        str(Path(find_spec(name).origin).parent.parent)
        for name in ("numpy", "tokenizers", "safetensors", "tqdm", "jinja2")
    }
    # these alone: an editable minioscar beside them is not found by this
    (site / "libraries.pth").write_text("\n".join(libraries))
    model = write_talker(tmp_path / "model", 1)

    def run(*command: str) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(python, "-c", EVERY_MODULE).strip() == str(site / "minioscar" / "__init__.py")
    script = str(tmp_path / "venv" / "bin" / "minioscar")
    answer = json.loads(
        run(script, "generate", str(model), "the cat", "--max-tokens", "2", "--ignore-eos", "--device", "cpu", "--json")
    )
    assert answer["new_tokens"] == 2
