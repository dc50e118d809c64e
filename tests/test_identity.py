"""A prompt cache is bound to the weights that made it: what became of their files since is found out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minioscar import engine as module
from minioscar.errors import UserError
from minioscar.storage import identity
from minioscar.storage.identity import WeightFiles

from .tiny import load, write_model

NAME = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_model(tmp_path / "model", 3)


def other(folder: Path, path: Path) -> None:
    """Other weights in a file of the same size."""
    tensors = load_file(folder / NAME)
    save_file({name: -x if "v_proj" in name else x for name, x in tensors.items()}, path)


def rename(folder: Path) -> None:
    other(folder, folder / "new")
    os.replace(folder / "new", folder / NAME)


def rewrite(folder: Path) -> None:
    other(folder, folder / "new")
    (folder / NAME).write_bytes((folder / "new").read_bytes())


def rewrite_with_the_old_times(folder: Path) -> None:
    before = os.stat(folder / NAME)
    rewrite(folder)
    os.utime(folder / NAME, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_a_byte(folder: Path) -> None:
    with open(folder / NAME, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def retarget(folder: Path) -> None:
    """As in a cache of the hub: files of a snapshot are links to blobs."""
    (folder / NAME).unlink()
    (folder / NAME).symlink_to(folder.parent / "blobs" / "b")


CHANGES = [
    rename, rewrite, rewrite_with_the_old_times, flip_a_byte, retarget, lambda f: (f / NAME).unlink(),
    lambda f: shutil.rmtree(f),
    lambda f: (f / NAME).write_bytes(b""), lambda f: ((f / NAME).unlink(), (f / NAME).mkdir()),
]


@pytest.fixture
def linked(folder) -> Path:
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    other(folder, blobs / "b")
    shutil.move(folder / NAME, blobs / "a")
    (folder / NAME).symlink_to(blobs / "a")
    return folder


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("use", ["save", "load"])
def test_weights_that_changed_after_loading_are_refused_in_one_line(linked, change, use, tmp_path):
    saver, engine, file = load(linked), load(linked), tmp_path / "c.safetensors"
    saver.prefill([1, 2, 3]).save(file)
    cache = engine.prefill([1, 2, 3])
    change(linked)
    message = f"{NAME} has changed since the model was loaded from it.*; load the model again"
    with pytest.raises(UserError, match=message) as error:
        cache.save(tmp_path / "d.safetensors") if use == "save" else engine.load_cache(file)
    assert "\n" not in str(error.value) and not (tmp_path / "d.safetensors").exists()
    assert engine.generate([4], cache=cache, max_tokens=2).prompt_tokens == 4  # in memory it is this model's still
    saver.load_cache(file)  # whose weights were hashed while they were there


def test_a_cache_goes_on_under_the_weights_that_made_it_only(folder, tmp_path):
    load(folder).prefill([1, 2, 3]).save(tmp_path / "c")
    rewrite(folder)
    with pytest.raises(UserError, match="made with other weights"):
        load(folder).load_cache(tmp_path / "c")


@pytest.mark.parametrize("change", [rename, rewrite, rewrite_with_the_old_times])
def test_weights_that_change_between_their_hash_and_their_reading_are_refused(folder, change, tmp_path, monkeypatch):
    load(folder).prefill([1, 2, 3]).save(tmp_path / "c")
    read = module.load_weights
    monkeypatch.setattr(module, "load_weights", lambda *args: (change(folder), read(*args))[1])
    with pytest.raises(UserError, match="the weight files have changed while the model was loaded; load it again"):
        module.load(folder, device="cpu", tokenizer=False, cache=tmp_path / "c")


@pytest.mark.parametrize("change", [rename, rewrite, rewrite_with_the_old_times, flip_a_byte])
def test_weights_that_change_while_they_are_read_or_hashed_are_refused(folder, change, monkeypatch):
    engine = load(folder)

    class Hash:
        def __init__(self) -> None:
            change(folder)

        def update(self, block: bytes) -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr(identity.hashlib, "sha256", Hash)
        with pytest.raises(UserError, match="has changed since"):
            engine.weights_sha256  # noqa: B018
    array, changed = type(engine.ops).array, []

    def changing(ops, x):
        changed or changed.append(change(folder))
        return array(ops, x)

    monkeypatch.setattr(type(engine.ops), "array", changing)
    with pytest.raises(UserError, match="has changed since"):
        load(folder)


def test_what_leaves_the_weights_alone_is_no_change(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    engine = load(Path(folder.name))
    (folder / "README.md").write_text("beside them")
    (folder / NAME).read_bytes()
    monkeypatch.chdir(tmp_path.parent)
    engine.prefill([1, 2]).save(tmp_path / "c")
    assert engine.load_cache(tmp_path / "c").ids == [1, 2]


def test_a_file_that_was_written_just_now_is_waited_for(folder, monkeypatch):
    """A change in the same tick of the file system's clock would not show."""
    waited, now = [], os.stat(folder / NAME).st_ctime_ns
    monkeypatch.setattr(identity.time, "sleep", waited.append)
    for age, want in ((0, [0.01]), (4_000_000, [0.006]), (10_000_000, []), (-5, []), (10**15, [])):
        monkeypatch.setattr(identity.time, "time_ns", lambda age=age: now + age)
        waited.clear()
        WeightFiles.of([folder / NAME])
        assert waited == pytest.approx(want)


def test_the_hash_is_of_all_shards_in_the_order_of_their_names(tmp_path):
    import hashlib

    paths = [tmp_path / name for name in ("b", "a", "c")]
    for i, path in enumerate(paths):
        path.write_bytes(np.full(5_000_000, i, np.uint8).tobytes())
    want = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sorted(paths))).hexdigest()
    assert WeightFiles.of(paths).sha256 == want


def test_loading_hashes_nothing(folder, monkeypatch):
    monkeypatch.setattr(identity.hashlib, "sha256", lambda *_: pytest.fail("the weights were hashed"))
    load(folder).prefill([1, 2, 3])
