"""The commands as a user runs them: what lands on which stream, in which form, and with which exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import types

import pytest

from limber_fast import cli, dispatch, native
from limber_fast.optional import how_to_install

COMMAND = (sys.executable, "-m", "limber_fast")
NOT_PLAIN = re.compile("[\x1b\u2500-\u259f]")  # escape codes, box drawing, block elements
PLAIN_ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "TTY_COMPATIBLE")}


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=120, env=PLAIN_ENVIRONMENT | env
    )


def stop_in_env(body: str) -> list[str]:
    """A process whose `env` command runs `body` instead of looking around."""
    code = f"import sys, time\nfrom limber_fast import cli, environment\ndef collect():\n    {body}\n"
    return [sys.executable, "-c", code + "environment.collect = collect\nsys.exit(cli.main(['env']))"]


def test_env_in_a_pipe_is_plain_and_names_every_choice():
    done = run("env")
    assert (done.returncode, done.stderr) == (0, "")
    assert not NOT_PLAIN.search(done.stdout)
    for word in ("torch", "threads", "OpenMP", native.cpu_isa(), "CUDA", *dispatch.OPS, *dispatch.BACKENDS):
        assert word in done.stdout


def test_env_json_is_all_of_stdout_and_gives_every_refusal():
    done = run("env", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    info = json.loads(done.stdout)
    assert info["cpu"]["isa"] == native.cpu_isa() and len(info["threads"]["openmp"]) == 1
    for op in dispatch.OPS:
        for device, choice in info["ops"][op].items():
            assert choice["backend"] in dispatch.ORDER[device]
            before = dispatch.ORDER[device][: dispatch.ORDER[device].index(choice["backend"])]
            assert all(choice["refused"][name] for name in before)


@pytest.mark.parametrize("name", ["LIMBER_FAST_BACKEND", "LIMBER_FAST_CPU_ISA"])
def test_env_fails_in_one_line_on_an_override_that_names_nothing(name):
    done = run("--quiet", "env", **{name: "abacus"})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"limber-fast: {name} must be one of ") and "got 'abacus'" in done.stderr


def test_env_reports_overrides_that_cannot_be_met_before_failing():
    done = run("env", "--json", LIMBER_FAST_CPU_ISA="sse9", LIMBER_FAST_BACKEND="abacus")
    assert done.returncode == 1
    info = json.loads(done.stdout)
    assert "got 'sse9'" in info["cpu"]["error"]
    assert all("got 'abacus'" in choice["error"] for choice in info["ops"]["info_nce"].values())
    assert "got 'abacus'" in run("env", LIMBER_FAST_BACKEND="abacus").stdout


def test_env_on_a_terminal_is_styled():
    master, slave = pty.openpty()
    environment = PLAIN_ENVIRONMENT | {"TERM": "xterm-256color"}
    with subprocess.Popen([*COMMAND, "env"], stdout=slave, env=environment) as process:
        os.close(slave)
        output = b""
        while chunk := _read(master):
            output += chunk
    os.close(master)
    assert process.returncode == 0
    assert NOT_PLAIN.search(output.decode()) and b"info_nce" in output


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux answers EIO once the other end has closed
        return b""


@pytest.mark.parametrize("arguments", [("env", "--quiet"), ("--quiet", "env")])
def test_quiet_prints_nothing(arguments):
    done = run(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "COMMAND"),
        (("train",), "invalid choice"),
        (("demo", "--minutes", "0"), "must be positive; got 0"),
        (("demo", "--loss", "triton"), "invalid choice"),
        (("demo", "--threads", "two"), "invalid positive int value"),
        (("bench", "--fail-over", "10%"), "--fail-over needs --compare"),
        (("bench", "--compare", "old.json", "--fail-over", "10"), "must be a percentage such as 10%; got 10"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, word, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and word in capsys.readouterr().err


def test_percentages_are_fractions():
    args = cli.build_parser().parse_args(["bench", "--compare", "old.json", "--fail-over", "10%"])
    assert args.fail_over == pytest.approx(0.1)


def test_help_and_version_load_no_command():
    code = """
import sys
from limber_fast import cli
cli.build_parser().format_help()
print(sorted({"rich", "limber_fast.environment", "limber_fast.console", "limber_fast.demo"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
    assert re.fullmatch(r"limber_fast \d+\.\d+\.\d+\n", run("--version").stdout)


def test_bench_without_a_checkout_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "limber_fast" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "source checkout" in captured.err


def test_missing_extra_names_its_install_command(monkeypatch, capsys):
    def main(args, console):
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")

    monkeypatch.setitem(sys.modules, "limber_fast.demo", types.SimpleNamespace(main=main))
    monkeypatch.setattr("limber_fast.demo", sys.modules["limber_fast.demo"], raising=False)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "limber-fast: demo needs open_clip: pip install 'limber_fast[demo]'\n"


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [("sklearn", "demo", "pip install 'limber_fast[demo]'"), ("sklearn", "train-limber", "pip install scikit-learn"),
     ("timm", "train-limber", "pip install 'limber_fast[train-limber]'"),
     ("tensorboard", "demo", "pip install tensorboard"),
     ("matplotlib", "evaluate", "pip install matplotlib"), ("PIL", "evaluate", "pip install 'limber_fast[evaluate]'")],
)  # fmt: skip
def test_the_install_command_brings_what_is_missing(module, extra, command):
    assert how_to_install(module, extra) == command


@pytest.mark.parametrize(
    "arguments", [["demo", "--seed", "-1"], ["demo", "--seed", "x"], ["reproduce", "--miniature", "--seed=1.5"]]
)
def test_a_seed_is_a_whole_number(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "argument --seed: must be a whole number of at least 0, below 2^62; got" in capsys.readouterr().err


def test_expected_failure_is_one_line_and_exits_with_1():
    done = subprocess.run(stop_in_env("raise OSError('disk full')"), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "limber-fast: disk full\n")


def test_ctrl_c_exits_with_130():
    with subprocess.Popen(
        stop_in_env("print('ready', flush=True); time.sleep(60)"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite started in the background hands down an ignored SIGINT, which Python then leaves ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "limber-fast: interrupted\n")


@pytest.mark.parametrize("arguments", [("env",), ("env", "--json")])
def test_reader_that_leaves_gets_no_traceback(arguments):
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (1, b"")
