"""The first answer on a fresh card: which kernels a run needs is known before it launches any, and they are compiled
side by side."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import presets
from minioscar.cache import Cache
from minioscar.compilation import cubins
from minioscar.compilation.ahead import programs
from minioscar.errors import Failure
from minioscar.generation import Options
from minioscar.model import Model
from minioscar.ops import launch
from minioscar.ops.cuda import OnPaper
from minioscar.ops.launch import Card
from minioscar.oscar import SCHEMES
from minioscar.sampling import RowSampling, Sampling
from minioscar.towers.media import Encoder

from . import test_pictures as pictures
from .patience import at_most
from .test_cuda_backend import SIMULATED
from .test_decode_step import of_backend
from .tiny import MOE, blank_weights, load, write_model


class Compiler:
    """Stand-in for CuPy's binding of NVRTC (`cupy.cuda.nvrtc`): compiling takes a while, and says how many do it at a
    time."""

    NVRTCError = type("NVRTCError", (Exception,), {})

    def __init__(self, seconds: float = 0.0, broken: str = "nothing"):
        self.seconds, self.broken, self.lock = seconds, broken, threading.Lock()
        self.running = self.most = 0
        self.made: list[str] = []

    def getVersion(self):
        return 13, 0

    def createProgram(self, code, name, headers, include_names):
        return name

    def compileProgram(self, name, options):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self.seconds)
        with self.lock:
            self.running -= 1
            self.made.append(name)
        if name == self.broken:
            raise self.NVRTCError("NVRTC_ERROR_COMPILATION (6)")

    def getCUBIN(self, name):
        return b"\x7fELF " + name.encode()

    def getProgramLog(self, name):
        return "step.cu(3): error:\n  identifier is undefined\n"

    def destroyProgram(self, name):
        pass


SOME = [
    ("step.cu", ()), ("linear.cu", ("NORM=1",)), ("linear.cu", ("NORM=0",)), ("sm90/linear_batch.cu", ("ROWS=128",))
]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cubins, "headers", lambda major: ())
    return tmp_path / "cache"


def test_what_is_missing_is_compiled_side_by_side_and_kept(empty_cache, capsys):
    nvrtc = Compiler(seconds=0.1)
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(cubins.os, "cpu_count", lambda: 4)
        assert cubins.compile_all([*SOME, *SOME], 90, nvrtc, progress=True) == len(SOME)
    assert sorted(nvrtc.made) == sorted(file for file, _ in SOME) and nvrtc.most == len(SOME)
    assert "compiling kernels" in (said := capsys.readouterr()).err and not said.out
    assert len(list(empty_cache.iterdir())) == len(SOME)
    assert cubins.compile_all(SOME, 90, nvrtc, progress=True) == 0 and len(nvrtc.made) == len(SOME)
    assert capsys.readouterr().err == ""
    for program in SOME:
        assert cubins.compiled(program, 90, nvrtc).read_bytes() == b"\x7fELF " + program[0].encode()
    assert len(nvrtc.made) == len(SOME)


def test_another_card_macro_or_compiler_has_machine_code_of_its_own(monkeypatch):
    nvrtc, newer = Compiler(), Compiler()
    newer.getVersion = lambda: (13, 1)
    found = [
        cubins.cubin(("step.cu", defines), arch, n) for defines in ((), ("A=1",)) for arch in (80, 90)
        for n in (nvrtc, newer)
    ]
    assert len(set(found)) == 8
    assert "sm_90a" in cubins.options(("sm90/linear_batch.cu", ()), 90)[0]
    assert "sm_90a" not in cubins.options(("step.cu", ()), 90)[0]


def test_a_kernel_that_does_not_compile_is_one_line(capsys):
    with pytest.raises(Failure, match=r"^step.cu does not compile for this GPU .*error: identifier is undefined$"):
        cubins.compile_all(SOME, 90, Compiler(broken="step.cu"), progress=False)
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_says_how_to_take_another(empty_cache):
    empty_cache.write_text("a file in its place")
    with pytest.raises(Failure, match=r"cache: compiled kernels cannot be kept there \(.*\); set CUPY_CACHE_DIR"):
        cubins.compile_all(SOME, 90, Compiler(), progress=False)


def test_missing_headers_of_cuda_say_what_brings_them(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cupy", type(sys)("cupy"))
    sys.modules["cupy"].cuda = type(sys)("cuda")
    sys.modules["cupy"].cuda.get_cuda_path = lambda: str(tmp_path)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.setattr(cubins, "wheel_headers", lambda major: [])
    with pytest.raises(Failure, match=r"cuda_fp16.h.*minioscar\[cuda12\].*CUDA_PATH"):
        cubins.headers.__wrapped__(12)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_fp16.h").touch()
    assert cubins.headers.__wrapped__(12) == (tmp_path / "include",)


CASES = [  # scheme, lengths of the prompts, sampling, compute capability
    ("int2", [1], Sampling(), 80, {}),
    ("int2", [300], Sampling(0.8, top_p=0.9), 90, {}),
    ("int2", [140, 3, 9], Sampling(0.7, presence_penalty=0.5), 80, {}),
    ("k4v2", [140], Sampling(), 80, {}),
    ("bf16", [20], Sampling(1.0, top_k=5), 90, {}),
    ("bf16", [280], Sampling(), 90, MOE),
    ("int2", [20], Sampling(), 80, MOE),
]


@pytest.mark.parametrize(("kv", "lengths", "sampling", "arch", "changes"), CASES)
@SIMULATED
def test_what_a_run_launches_is_known_before(kv, lengths, sampling, arch, changes, tmp_path):
    """Exactly that: a first turn and, over what its cache holds, a second one."""
    from .simt.backend import Simt

    class Noting(Simt):
        def __init__(self):
            super().__init__(arch)
            self.launched, self.listed = set(), set()

        def run(self, launch):
            self.launched.add((launch.source, launch.defines))
            super().run(launch)

        def prepare(self, model, cache, passes, rows, progress):
            self.listed |= set(programs(OnPaper(self.card), model, cache, passes, rows))

    folder = write_model(tmp_path / "m", 1, head_dim=64, num_hidden_layers=1, **changes)
    _, engine, ops = of_backend(Noting, folder, kv)
    engine.ops = engine.model.ops = ops
    ops.launched.clear()
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 160, n).tolist() for n in lengths]
    for _ in engine.start(prompts, options=Options(max_tokens=3, sampling=sampling)):
        pass
    assert ops.launched == ops.listed
    cache = engine.prefill(prompts[0])
    ops.launched.clear(), ops.listed.clear()
    engine.generate([*prompts[0], 3, 4], cache=cache, max_tokens=3, temperature=1.0)
    assert ops.launched == ops.listed


@SIMULATED
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_of_a_prompt_with_a_picture_are_listed_before_its_tower_has_run(arch, monkeypatch):
    """What a tower made is on the card, and nothing can be put into arrays that have shapes alone."""
    from .simt.backend import Simt

    (_, engine, ops), (ids, media) = of_backend(Simt, pictures.FOLDER, "int2"), pictures.prompt("row")
    engine.ops = engine.model.ops = ops
    monkeypatch.setattr(Encoder, "_features", lambda *_: pytest.fail("a tower was asked"))
    cache = Cache(engine.config, engine.scheme, 1, 512, ops)
    batch = cache.batch_for([0], [len(ids)])
    text, found = (
        programs(OnPaper(Card(132, arch)), engine.model, cache, [each], ())
        for each in (batch, batch.reading([ids], media))
    )
    assert found and set(found) == set(text)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 20, 300])
def test_nothing_is_compiled_after_the_first_launch_on_a_card(tokens, tmp_path, monkeypatch):
    """Every kernel's machine code is on disk when it is first asked for."""
    monkeypatch.undo()  # CUDA's headers are there
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    engine, asked = load(write_model(tmp_path / "m", 1, head_dim=64), "int2", "cuda"), []

    def compiled(program, *rest):
        asked.append((program, cubins.cubin(program, *rest).exists()))
        return cubins.compiled(program, *rest)

    launch.kernel.cache_clear()
    monkeypatch.setattr(launch, "compiled", compiled)
    engine.generate([5] * tokens, max_tokens=4)
    assert len(asked) > 5 and all(there for _, there in asked), asked


def listed(preset: str, kv: str, lengths: list[int], arch: int) -> list[cubins.Program]:
    """What a run of a published shape launches."""
    config, ops = replace(presets.config_of(preset), num_layers=1), OnPaper(Card(132, arch))
    model = Model(config, blank_weights(config, SCHEMES[kv]), SCHEMES[kv], ops)
    cache = Cache(config, SCHEMES[kv], len(lengths), 4096, ops)
    rows = [RowSampling(Sampling())] * len(lengths)
    return programs(ops, model, cache, [cache.batch_for(range(len(lengths)), lengths)], rows)


@pytest.mark.parametrize("arch", [80, 90])
def test_a_long_prompt_of_a_large_model_is_listed_in_no_time_and_no_memory(arch):
    """The weights of Qwen3-8B would be 16 GB, its cache of 4,096 tokens 600 MB."""
    listed("qwen3-8b", "int2", [8], arch)
    with at_most(0.2):
        found = listed("qwen3-8b", "int2", [4000], arch)
    assert 8 <= len(found) <= 20
    assert {"pack.cu", "decode_attention.cu", "step.cu", "sample.cu"} <= {file for file, _ in found}


@pytest.mark.parametrize(("arch", "files"), [(80, 1), (90, 2)])
def test_the_kernels_of_experts_are_listed_too(arch, files):
    """Those of a prompt and those of a step, which has few tokens."""
    found = [file for file, _ in listed("qwen3-30b-a3b", "int2", [4000], arch) if "experts" in file]
    assert len(set(found)) == 1 + files and found.count("experts/experts.cu") == (4 if arch == 80 else 2)
