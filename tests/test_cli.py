"""The command line's stable promises: streams, JSON keys, exit codes, one line for every error."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from minioscar import oscar
from minioscar.app import cli, flags, serving, wake
from minioscar.app.cli import main
from minioscar.config import Config
from minioscar.errors import UserError
from minioscar.evaluation import fidelity
from minioscar.generation import Options, Run
from minioscar.sampling import Sampling
from minioscar.storage import hub

from .patience import at_most
from .tiny import CONFIG, MOE, write_model, write_talker


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return hub.resolve("smollm2-135m")


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_help_answers_before_anything_heavy_is_imported():
    """Counted in modules, and in seconds of the processor."""
    listing = (
        "import sys; from minioscar.app.cli import main; main(['--help']); print({'numpy', 'tokenizers', 'cupy'} & "
        "set(sys.modules))"
    )
    assert subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True
    ).stdout.rstrip().endswith("set()")
    with at_most(0.3, "--help"):
        subprocess.run([sys.executable, "-m", "minioscar", "--help"], check=True, stdout=subprocess.DEVNULL)


class Driver:
    """libcuda.so.1; `fails`: the call that has no success."""

    def __init__(self, fails: str = ""):
        self.fails, self.calls = fails, []

    def __getattr__(self, name: str):
        return lambda *_: self.calls.append(name) or (100 if name == self.fails else 0)


CALLS = ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]


@pytest.mark.parametrize(
    ("fails", "calls"), [("", CALLS), ("cuInit", CALLS[:1]), ("cuDeviceGet", CALLS[:2]), (CALLS[2], CALLS)]
)
def test_a_context_is_made_in_a_thread_as_far_as_it_goes(fails, calls, monkeypatch):
    driver = Driver(fails)
    monkeypatch.setattr(wake, "find_spec", lambda _: True)
    monkeypatch.setattr(wake.ctypes, "CDLL", lambda name: driver if name == "libcuda.so.1" else None)
    wake.wake("auto")
    for thread in threading.enumerate():
        if thread.name == "wake":
            thread.join()
    assert driver.calls == calls


@pytest.mark.parametrize("why_not", ["cpu", "simulator", "no CuPy", "no driver"])
def test_no_context_is_made_where_none_is_wanted_or_can_be(why_not, monkeypatch):
    driver = Driver()

    def library(_: str) -> Driver:
        if why_not == "no driver":
            raise OSError("libcuda.so.1: cannot open shared object file")
        return driver

    monkeypatch.setattr(wake, "find_spec", lambda _: None if why_not == "no CuPy" else True)
    # here and now: what it raises is seen
    monkeypatch.setattr(wake, "Thread", lambda target, name: SimpleNamespace(start=target))
    monkeypatch.setattr(wake.ctypes, "CDLL", library)
    monkeypatch.setenv("MINIOSCAR_BACKEND", "tests.simt.backend:Simt" if why_not == "simulator" else "")
    wake.wake("cpu" if why_not == "cpu" else "auto")
    assert not driver.calls


COMMANDS = [
    "generate nowhere x", "generate nowhere --prompts-file F", "chat nowhere", "cache nowhere --prompt-file F --out F"
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_context_is_begun_before_anything_heavy_is_imported(command, tmp_path):
    code = """
import sys
from minioscar.app import commands
commands.wake = lambda device: print(device, {'numpy', 'tokenizers', 'cupy'} & set(sys.modules))
from minioscar.app.cli import main
main([*sys.argv[1:], "--device", "cuda"])
"""
    argv = command.replace("F", str(tmp_path / "file")).split()
    (tmp_path / "file").write_text('"x"')
    assert subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True
    ).stdout.startswith("cuda set()")


def test_every_example_of_the_help_is_a_command_that_parses(capsys):
    texts = [flags.EXAMPLES, *flags.MORE_EXAMPLES.values()]
    examples = [
        line.split("python -m minioscar ")[1] for text in texts for line in text.splitlines()
        if "python -m minioscar " in line
    ]
    assert {example.split()[0] for example in examples} == set(cli.COMMANDS)
    for example in examples:
        words = shlex.split(example.split(" > ")[0])
        assert cli.parser().parse_args(words).command == words[0]
    for command in cli.COMMANDS:
        assert main([command, "--help"]) == 0
        assert "example" in capsys.readouterr().out


def test_help_names_every_scheme():
    """It is typed there, so that --help imports nothing."""
    assert flags.SCHEMES.split(", ") == list(oscar.SCHEMES)


def test_demo_prints_paris_on_stdout_and_statistics_on_stderr(smollm2, capsys):
    code, out, err = run(capsys, "generate", "smollm2-135m", "The capital of France is", "--raw", "--max-tokens", 24)
    assert code == 0 and out.startswith(" Paris") and out.endswith("\n")
    assert "tokens/s" in err and "int2 cache" in err and "Paris" not in err


def test_generate_json_is_one_object_with_the_stable_keys(smollm2, capsys):
    code, out, _ = run(
        capsys, "generate", smollm2, "Hi", "--max-tokens", 3, "--json", "--kv", "oscar", "--temperature", "0.8",
        "--seed", 3
    )
    result = json.loads(out)
    keys = "text token_ids prompt_tokens new_tokens finish_reason kv kv_bytes device prefill_s decode_s tokens_per_s"
    assert code == 0 and set(result) == set(keys.split())
    assert result["kv"] == "oscar" and result["new_tokens"] == len(result["token_ids"]) <= 3
    assert result["prompt_tokens"] > 10  # the chat template is the default where a model has one


def test_prompt_file_is_the_prompt(smollm2, capsys, tmp_path):
    (tmp_path / "p.txt").write_text("The capital of France is")
    code, out, _ = run(capsys, "generate", smollm2, "--prompt-file", tmp_path / "p.txt", "--raw", "--max-tokens", 1)
    assert (code, out) == (0, " Paris\n")


def test_the_prompt_may_stand_anywhere(smollm2, capsys):
    for argv in (
        ["--raw", "--max-tokens", "1", "The capital of France is"],
        ["--raw", "The capital of France is", "--max-tokens", "1"]
    ):
        assert run(capsys, "generate", smollm2, *argv)[:2] == (0, " Paris\n")


@pytest.mark.parametrize("argv", [
    "generate {m} -- -5", "generate {m} --max-tokens 3 -- -5", "generate --raw {m} -- -5", "generate -- {m} -5",
    "generate {m} -- --raw", "generate {m} --raw -- -",
])  # fmt: skip
def test_behind_two_hyphens_a_prompt_may_begin_with_one(argv):
    args = cli.parsed(argv.format(m="MODEL").split())
    assert (args.model, args.prompt) == ("MODEL", argv.split()[-1])


def test_a_prompt_of_several_words_may_begin_with_a_hyphen_anywhere():
    for argv in (["MODEL", "-5 + 3 =", "--raw"], ["MODEL", "--raw", "-5 + 3 ="]):
        assert cli.parsed(["generate", *argv]).prompt == "-5 + 3 ="


@pytest.mark.parametrize(("argv", "hint"), [
    (["generate", "m", "hi", "there"], "a PROMPT of several words needs quotes"),
    (["generate", "--raw", "m", "a", "b"], "a PROMPT of several words needs quotes"),
    (["generate", "--temprature", "1", "m", "x"], "did you mean --temperature?"),
    (["generate", "m", "x", "--maxtokens=3"], "did you mean --max-tokens?"),
    (["serve", "m", "--prot", "80"], "did you mean --port?"),
    (["generate", "m", "--raw", "-x"], "a PROMPT that begins with - goes behind --"),
    (["generate", "m", "--", "-5", "+", "3"], "a PROMPT of several words needs quotes"),
    (["--json", "info", "m"], "--json goes behind info"),
    (["info", "m", "n"], "; see minioscar info --help"),
])  # fmt: skip
def test_arguments_that_nobody_takes_are_named_with_what_may_have_been_meant(argv, hint, capsys):
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("minioscar: unrecognized arguments: ") and hint in err and err.endswith(" --help\n")


def test_of_several_answers_the_speed_is_that_of_all(smollm2, capsys):
    _, _, err = run(capsys, "generate", smollm2, "One", "--n", 3, "--max-tokens", 4, "--raw", "--ignore-eos")
    seconds, rate = (float(one) for one in re.search(r"12 new in ([\d.]+) s \(([\d.]+) tokens/s", err).groups())
    assert rate == pytest.approx(9 / seconds, rel=0.1, abs=0.1)


EMPTY = "import sys; sys.modules[{0!r}] = None; from minioscar.app.cli import main; sys.exit(main({1!r}))"


@pytest.mark.parametrize(("package", "argv", "way_out"), [
    ("numpy", ["info", "reader"], "pip install ."),
    ("ml_dtypes", ["generate", "reader", "A9?"], ".venv/bin/python after make demo"),
    ("tokenizers", ["generate", "reader", "A9?"], "pip install ."),
    ("PIL", ["eval", "reader", "--images"], "pip install 'minioscar[vision]'"),
    ("matplotlib", ["inspect", "reader"], "pip install 'minioscar[plot]'"),
    ("uvicorn", ["serve", "reader"], "pip install 'minioscar[serve,structured]'"),
])  # fmt: skip
def test_a_package_that_is_not_installed_is_named_with_how_to_have_it(package, argv, way_out):
    done = subprocess.run([sys.executable, "-c", EMPTY.format(package, argv)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert way_out in done.stderr and "unexpected" not in done.stderr


def test_every_package_of_pyproject_has_a_way_out():
    """What a command may import: dependencies and extras, by the names of their modules."""
    project = (Path(cli.__file__).parents[2] / "pyproject.toml").read_text()
    modules = {"huggingface-hub": "huggingface_hub", "pillow": "PIL"}
    base = re.findall(r'^  "([\w-]+)>', re.search(r"\ndependencies = \[\n(.*?)\]", project, re.S)[1], re.M)
    assert {modules.get(name, name) for name in base} == cli.NEEDED
    for module, extra in cli.EXTRAS.items():
        listed = re.search(rf"\n{extra} = \[(.*)\]", project)[1]
        assert next((dist for dist, name in modules.items() if name == module), module) in listed


def test_the_program_and_the_module_begin_alike():
    """A Ctrl-C while they are imported ends them without a traceback."""
    project = (Path(cli.__file__).parents[2] / "pyproject.toml").read_text()
    assert '\nminioscar = "minioscar.__main__:main"\n' in project
    listing = "import signal as s; from minioscar.__main__ import main; print(s.getsignal(s.SIGINT) == s.SIG_DFL)"
    assert subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True).stdout == "True\n"


def test_only_commands_that_have_cache_speak_of_it():
    for command, (_, given) in flags.FLAGS.items():
        how = dict(given).get("--kv", {"help": ""})["help"]
        assert ("or that of --cache" in how) == ("--cache" in dict(given)), command


@pytest.mark.parametrize(("argv", "said"), [
    (["--api-key", ""], "--api-key (or $MINIOSCAR_API_KEY) is empty"),
    (["--name", ""], "--name is empty"),
    (["--cors", "chat.example"], "--cors 'chat.example' is no origin"),
    (["--cors", "https://chat.example/"], "--cors 'https://chat.example/' is no origin"),
    (["--cors", "*", "--cors", "https://Chat.example"], "--cors 'https://Chat.example' is no origin"),
])  # fmt: skip
def test_what_would_leave_a_server_open_or_a_page_out_is_refused(argv, said, capsys, monkeypatch):
    monkeypatch.delenv("MINIOSCAR_API_KEY", raising=False)
    code, _, err = run(capsys, "serve", "reader", "--port", 0, *argv)
    assert code == 2 and said in err


def test_a_key_of_the_environment_must_not_be_empty_and_origins_are_as_browsers_spell_them(monkeypatch):
    def plan(*argv: str):
        return serving.plan_of(cli.parsed(["serve", ".", *argv]))

    monkeypatch.setenv("MINIOSCAR_API_KEY", "")
    with pytest.raises(UserError, match="empty"):
        plan()
    monkeypatch.setenv("MINIOSCAR_API_KEY", "sesame")
    origins = ["*", "null", "https://chat.example", "http://10.0.0.7:3000", "app://obsidian.md", "http://[::1]:80"]
    found = plan(*(word for origin in origins for word in ("--cors", origin)))
    assert found.key == "sesame" and found.origins == origins and found.name == Path.cwd().name
    assert plan("--api-key", "other").key == "other"


def test_eval_json_has_the_baseline_first_and_the_stable_keys(smollm2, capsys):
    code, out, _ = run(capsys, "eval", smollm2, "--prefill", 150, "--decode", 20, "--kv", "oscar,int2", "--json")
    report = json.loads(out)
    assert code == 0 and set(report) == {"model", "device", "prefill", "decode", "windows", "results"}
    assert [row["kv"] for row in report["results"]] == ["bf16", "oscar", "int2"]
    assert set(report["results"][0]) == {
        "kv", "bits_per_element", "nll", "ppl", "dnll", "kl", "top1", "dnll_se", "kl_se", "weights"
    }
    assert (report["results"][0]["kl"], report["results"][0]["top1"], report["results"][0]["dnll"]) == (0, 1, 0)
    assert all(row["kl"] > 0 for row in report["results"][1:])


def test_eval_prints_a_table(smollm2, capsys, tmp_path):
    (tmp_path / "t.txt").write_text("one two three four five six seven eight nine ten eleven twelve")
    code, out, _ = run(
        capsys, "eval", smollm2, "--prefill", 5, "--decode", 3, "--kv", "int4", "--text", tmp_path / "t.txt"
    )
    assert code == 0 and "| int4 | 5.000 |" in out


@pytest.mark.long
def test_eval_with_needle_tools_and_drift_adds_their_objects_and_tables(smollm2, capsys, monkeypatch):
    for part in ("needle", "tool_calls"):
        monkeypatch.setattr(f"minioscar.evaluation.{part}.DEPTHS", (0.5,))
        monkeypatch.setattr(f"minioscar.evaluation.{part}.REPEATS", 1)
    options = ["--prefill", 130, "--decode", 5, "--kv", "int4", "--needle", "400", "--tools", "400", "--drift", 10]
    code, out, _ = run(capsys, "eval", smollm2, *options, "--json")
    report = json.loads(out)
    assert code == 0
    assert set(report) == {"model", "device", "prefill", "decode", "windows", "results", "drift", "needle", "tools"}
    assert report["drift"]["tokens"] == 10 and len(report["drift"]["results"][1]["first_difference"]) == 1
    assert set(report["drift"]["results"][1]) == {"kv", "first_difference", "same_tokens", "kl"}
    assert report["needle"]["lengths"] == report["tools"]["lengths"] == [512]
    assert set(report["needle"]["results"][1]) == {"kv", "exact_match", "by_length_and_depth"}
    tables = fidelity.table(report)
    parts = "| int4 | 5.000 |", "Passkeys found", "Tool calls copied", "Greedy continuation, 10 tokens"
    assert all(part in tables for part in parts)


def test_info_needs_no_weights(smollm2, capsys, tmp_path):
    shutil.copy(smollm2 / "config.json", tmp_path)
    code, out, _ = run(capsys, "info", tmp_path, "--ctx", 8192, "--batch", 4, "--json")
    report = json.loads(out)
    assert code == 0 and report["parameters"] == 134_515_008
    by = {row["kv"]: row for row in report["schemes"]}
    assert by["bf16"]["bytes_per_token"] == 30 * 2 * 3 * 64 * 2 and by["int2"]["bits_per_element"] == 2.625
    assert by["bf16"]["cache_bytes"] == 4 * 8192 * 23040
    assert 5 < by["int2"]["ratio_to_bf16"] < 5.82
    code, out, _ = run(capsys, "info", "smollm2-135m", "--ctx", 8192, "--batch", 4)
    assert code == 0 and "134,515,008 parameters" in out and "int2-compact" in out


def test_info_tells_the_weights_that_a_token_uses_from_all(capsys, tmp_path):
    config = {**CONFIG, **MOE}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = run(capsys, "info", tmp_path, "--json")
    report, made = json.loads(out), Config.from_dict(config)
    assert code == 0 and report["experts"] == {"count": 6, "per_token": 2, "normalized": False}
    assert (report["parameters"], report["active_parameters"]) == (made.parameters(), made.parameters(active=True))
    code, out, _ = run(capsys, "info", tmp_path)
    assert f"{made.parameters():,} parameters ({made.parameters(active=True):,} for a token)" in out
    assert "mlp 24, 2 of 6 experts a token" in out


def test_pull_prints_the_folder(smollm2, capsys):
    code, out, _ = run(capsys, "pull", "smollm2-135m")
    assert code == 0 and Path(out.strip()) == smollm2


def test_every_option_of_an_answer_reaches_it(tmp_path, capsys, monkeypatch):
    """Of generate, many prompts and a chat; what each does is tested where it is done."""
    folder, seen = write_talker(tmp_path / "m", 5), []
    made = Run.__init__
    monkeypatch.setattr(
        Run, "__init__", lambda self, *args, **more: (seen.append(args[4]), made(self, *args, **more))[1]
    )
    (tmp_path / "p").write_text('"a"')
    options = (
        "--temperature .5 --top-p .6 --top-k 7 --min-p .08 --seed 9 --repetition-penalty 1.1 --presence-penalty .2 "
        "--frequency-penalty .3 --max-tokens 4 --min-tokens 2 --stop xx --stop yy --stop-id 300 --stop-id 301 "
        "--ignore-eos"
    )
    numbers = {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3}
    sampling = Sampling(temperature=0.5, top_p=0.6, top_k=7, min_p=0.08, seed=9, **numbers)
    want = Options(4, sampling, ("xx", "yy"), stop_ids=(300, 301), min_tokens=2, ignore_eos=True)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(b"a"))))
    for command in (
        ["generate", folder, "a"], ["generate", folder, "--prompts-file", tmp_path / "p"], ["chat", folder]
    ):
        assert run(capsys, *command, *options.split())[0] == 0
        given = seen.pop()
        assert all(one == want for one in (given if isinstance(given, list | tuple) else [given])), command
    for wrong, message in (
        ("--min-tokens 5 --max-tokens 4", "min_tokens 5"), ("--stop-id -1", "stop_ids -1"), ("--top-k -1", "top_k -1")
    ):
        code, _, err = run(capsys, "generate", folder, "a", *wrong.split())
        assert code == 2 and err.count("\n") == 1 and message in err


@pytest.fixture
def tiny(tmp_path) -> Path:
    return write_model(tmp_path / "tiny", 3)


def cases(tiny: Path) -> dict[str, tuple[list[str], str]]:
    empty = tiny.parent / "empty"
    empty.mkdir()
    odd = tiny.parent / "odd"
    write_model(odd, 3)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    torn = write_model(tiny.parent / "torn", 3)
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    shutil.copy(hub.resolve("smollm2-135m") / "tokenizer.json", torn)
    smollm2 = "smollm2-135m"
    latin = tiny.parent / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    return {
        "no command": ([], "COMMAND"),
        "unknown command": (["fly"], "'fly'"),
        "unknown flag": (["generate", smollm2, "x", "--fast"], "--fast"),
        "not a number": (["generate", smollm2, "x", "--max-tokens", "many"], "'many'"),
        "no prompt": (["generate", smollm2], "give one of PROMPT (- is standard input), --prompt-file and"),
        "two prompts": (
            ["generate", smollm2, "x", "--prompt-file", "y"], "give one of PROMPT (- is standard input), --prompt-file"
        ),
        "empty prompt": (["generate", smollm2, ""], "prompt is empty"),
        "missing prompt file": (["generate", smollm2, "--prompt-file", "nowhere.txt"], "nowhere.txt"),
        "prompt not UTF-8": (["generate", smollm2, "--prompt-file", str(latin)], "UTF-8"),
        "chat and raw": (["generate", smollm2, "x", "--chat", "--raw"], "--raw"),
        "unknown model": (["generate", "no-such-model", "x"], "no-such-model"),
        "folder without config": (["generate", str(empty), "x"], "config.json"),
        "unsupported model": (["generate", str(odd), "x"], "'mamba'"),
        "truncated weights": (["generate", str(torn), "x"], "truncated"),
        "no tokenizer": (["generate", str(tiny), "x"], "tokenizer.json"),
        "unknown scheme": (["generate", smollm2, "x", "--kv", "int1"], "'int1'"),
        "context too long": (["generate", smollm2, "x", "--ctx", "9000"], "8192"),
        "context below 1": (["generate", smollm2, "x", "--ctx", "0"], "--ctx 0"),
        "no tokens": (["generate", smollm2, "x", "--max-tokens", "0"], "max_tokens 0"),
        "prompt longer than context": (
            ["generate", smollm2, "one two three four", "--raw", "--ctx", "2"], "context holds 2"
        ),
        "temperature": (["generate", smollm2, "x", "--temperature", "-1"], "temperature -1"),
        "top-p": (["generate", smollm2, "x", "--top-p", "2"], "top_p 2"),
        **eval_cases(smollm2, tiny),
        "info context": (["info", smollm2, "--ctx", "10000"], "8192"),
        "info batch": (["info", smollm2, "--batch", "0"], "--batch 0"),
        "pull unknown": (["pull", "no-such-model"], "no-such-model"),
    }


def eval_cases(smollm2: str, tiny: Path) -> dict[str, tuple[list[str], str]]:
    passage = tiny.parent / "passage.txt"
    passage.write_text("one two three four five six seven eight nine ten")
    return {
        "eval scheme": (["eval", smollm2, "--kv", "oscar,foo"], "'foo'"),
        "eval too long": (["eval", smollm2, "--prefill", "8000", "--decode", "1000"], "8192"),
        "eval short text": (
            ["eval", smollm2, "--text", str(tiny / "config.json"), "--prefill", "2000"], "the text has"
        ),
        "eval nothing": (["eval", smollm2, "--decode", "0"], "at least 1"),
        "needle no number": (["eval", smollm2, "--needle", "512,long"], "'512,long'"),
        "needle below 1": (["eval", smollm2, "--needle", "0"], "--needle 0"),
        "needle too long": (["eval", smollm2, "--needle", "8192"], "8192"),
        "needle too short": (["eval", smollm2, "--needle", "384"], "at least 385"),
        "tools no number": (["eval", smollm2, "--tools", "long"], "--tools 'long'"),
        "tools below 1": (["eval", smollm2, "--tools", "0"], "--tools 0"),
        "tools too long": (["eval", smollm2, "--tools", "8192"], "8192"),
        "tools short text": (
            ["eval", smollm2, "--text", str(passage), *"--prefill 3 --decode 3 --tools 700".split()], "--tools 700"
        ),
        "needle short text": (
            ["eval", smollm2, "--text", str(passage), *"--prefill 3 --decode 3 --needle 700".split()], "--needle 700"
        ),
        "drift below 0": (["eval", smollm2, "--drift", "-1"], "--drift -1"),
        "drift too long": (["eval", smollm2, "--drift", "8000"], "8192"),
    }


def test_every_bad_input_is_one_line_and_exit_code_2(tiny, capsys):
    for name, (argv, mention) in cases(tiny).items():
        with at_most(10, f"{name}: refused only after long work"):
            code, out, err = run(capsys, *argv)
        assert (code, out) == (2, ""), name
        assert err.startswith("minioscar: ") and err.count("\n") == 1 and mention in err, (name, err)


def test_device_cuda_without_cuda_is_refused(smollm2, capsys, monkeypatch):
    monkeypatch.setattr("minioscar.ops.cuda_missing", lambda: "no usable GPU")
    code, _, err = run(capsys, "generate", smollm2, "x", "--device", "cuda")
    assert code == 2 and err == "minioscar: --device cuda: no usable GPU; --device cpu works everywhere\n"


def test_debug_shows_the_traceback_and_the_line(capsys):
    code, _, err = run(capsys, "info", "no-such-model", "--debug")
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("minioscar: ")


def test_ctrl_c_is_one_line_and_exit_code_130(smollm2, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("minioscar.decoding.Decoder.launch", interrupt)
    code, _, err = run(capsys, "generate", smollm2, "x")
    assert code == 130 and err.splitlines()[-1] == "minioscar: interrupted"
