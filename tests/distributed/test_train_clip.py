"""`limber-fast train-clip` on one process and several: resumed bit for bit, one run for any number of them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

pytest.importorskip("open_clip")

from limber_fast import cli, train_clip
from limber_fast.data.emoji import EmojiDataset
from limber_fast.train_limber import pairs_of
from limber_fast.training.checkpoint import CLIP, load_checkpoint
from limber_fast.training.clip_config import ClipTrainConfig

TINY = {
    "embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16,
                                    "patch_dropout": 0.5},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}  # fmt: skip
SMALL = {"steps": 6, "warmup": 2, "batch_size": 10, "save_every": 2, "precision": "fp32", "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny-clip.json"
    path.write_text(json.dumps(TINY))
    return str(path)


class Killed(Exception):
    pass


def train(rank, size, settings, folder, killed_at=None, resumed=False):
    """Weights after the last step, and what was skipped; or at `killed_at` what a killed process leaves: files."""
    config = ClipTrainConfig(**settings)
    trainer = train_clip.build_trainer(config, pairs_of(config))
    if resumed:
        trainer.restore(load_checkpoint(folder / "checkpoint.pt", CLIP))
        assert 0 < trainer.step < config.steps

    def watch(step, values):
        if step == killed_at:
            raise Killed

    try:
        assert trainer.run(folder, watch)
    except Killed:
        assert killed_at
    return {name: x.clone() for name, x in trainer.model.state_dict().items()}, trainer.skipped


@pytest.mark.parametrize("size, loss, micro", [(1, "clip", 0), (3, "siglip", 0), (1, "siglip", 4), (3, "clip", 2)])
def test_resumed_bit_for_bit(ranks, tiny, tmp_path, size, loss, micro):
    settings = {**SMALL, "model": tiny, "loss": loss, "precision": "bf16", "micro_batch": micro}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = ranks.run(size, train, settings, whole)
    ranks.run(size, train, settings, parts, 3)  # a step after the checkpoint
    found = ranks.run(size, train, settings, parts, None, True)
    for (mine, _), (theirs, _) in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert all(torch.equal(x, expected[0][0][name]) for name, x in theirs.items())  # alike on all ranks
    a, b = (load_checkpoint(folder / "checkpoint.pt", CLIP) for folder in (whole, parts))
    assert a["step"] == b["step"] == 6
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in state["history"]] for state in (a, b)]
    assert rows[0][-1] == rows[1][-1]


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_any_number_of_processes_makes_the_same_run(ranks, tiny, tmp_path, loss):
    # Patches are dropped process by process: not here. 10 pairs are shares of 4, 3 and 3.
    model = json.loads(json.dumps(TINY))
    del model["vision_cfg"]["patch_dropout"]
    path = tmp_path / "whole-clip.json"
    path.write_text(json.dumps(model))
    settings = {**SMALL, "model": str(path), "loss": loss, "steps": 4}
    (alone,), *others = (ranks.run(size, train, settings, tmp_path) for size in (1, 2, 3))
    for results in others:
        for name, x in alone[0].items():
            torch.testing.assert_close(results[0][0][name], x, rtol=1e-3, atol=2e-5)


def limber_folder(root, broken):
    """Emoji as files in LiMBeR's layout; the pictures at `broken` are cut off."""
    data = EmojiDataset()
    for i in range(12):
        for part in ("images", "image_data"):
            (root / part / "0").mkdir(parents=True, exist_ok=True)
        path = root / "images" / "0" / f"{i}.png"
        Image.fromarray(data.images[i]).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:60])
        entry = {"captions": [f"picture {i}", f"number {i}"], "image_path": f"images/0/{i}.png"}
        (root / "image_data" / "0" / f"{i}.json").write_text(json.dumps(entry))


def test_broken_pictures_leave_unequal_batches(ranks, tiny, tmp_path):
    limber_folder(tmp_path / "data", broken={1, 7})
    settings = {**SMALL, "model": tiny, "data": str(tmp_path / "data"), "batch_size": 12, "steps": 3}
    first, second = ranks.run(2, train, settings, tmp_path)
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    skipped = first[1] | second[1]
    assert sorted(name.rpartition("/")[2] for name in skipped) == ["1.png", "7.png"]


def test_what_was_skipped_survives_a_kill(ranks, tiny, tmp_path):
    limber_folder(tmp_path / "data", broken={0, 7, 9, 11})  # of steps 1, 3, 5 and 6
    settings = {**SMALL, "model": tiny, "data": str(tmp_path / "data"), "batch_size": 2, "steps": 6, "save_every": 1}
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    whole, parts = folders
    ranks.run(2, train, settings, whole)
    ranks.run(2, train, settings, parts, 4)
    told, state = (parts / "skipped.txt").read_text(), load_checkpoint(parts / "checkpoint.pt", CLIP)
    assert state["step"] == 3 and told.count("\n") == len(state["skipped"]) == state["left_out"] == 2
    ranks.run(2, train, settings, parts, None, True)
    ends = [load_checkpoint(folder / "checkpoint.pt", CLIP) for folder in folders]
    for name in ("skipped", "left_out"):
        assert ends[0][name] == ends[1][name] and ends[0]["left_out"] == 4
    assert (whole / "skipped.txt").read_text() == (parts / "skipped.txt").read_text()
    assert (parts / "skipped.txt").read_text().count("\n") == 4
    for name in ("skipped", "left_out"):  # as checkpoints were before they had these
        del state[name]
    torch.save(state, parts / "checkpoint.pt")
    ranks.run(2, train, settings, parts, None, True)


def test_a_step_that_leaves_a_process_nothing_is_left_out_by_all(ranks, tiny, tmp_path):
    limber_folder(tmp_path / "data", broken={5})
    settings = {**SMALL, "model": tiny, "data": str(tmp_path / "data"), "batch_size": 2, "steps": 6}  # one epoch
    first, second = ranks.run(2, train, settings, tmp_path)
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    assert [name.rpartition("/")[2] for name in first[1] | second[1]] == ["5.png"]
    state = load_checkpoint(tmp_path / "checkpoint.pt", CLIP)
    assert state["step"] == 6 and {int(x["step"]) for x in state["optimizer"]["state"].values()} == {5}


def command_apart(rank, size, flags, folder):
    """(exit code, errors) of the command in this process, whose output folder no other one sees."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = cli.main(["--quiet", "train-clip", *flags, "--output", str(folder / str(rank))])
    return code, said.getvalue()


def test_processes_that_see_other_checkpoints_stop(ranks, tiny, tmp_path):
    flags = ["--model", tiny, "--batch-size", "4", "--steps", "2", "--warmup", "0"]
    first, second = (tmp_path / str(rank) / "checkpoint.pt" for rank in range(2))
    assert ranks.run(2, command_apart, flags, tmp_path) == [(0, "")] * 2
    assert first.exists() and not second.exists()

    def refused(found):
        for code, said in ranks.run(2, command_apart, [*flags, "--resume"], tmp_path):
            said = " ".join(said.split())
            assert code == 1 and "checkpoint.pt: the file must be the same for all processes; got step 2 after" in said
            assert f"in process 0 and {found}" in said and "Traceback" not in said

    refused("none in process 1")
    state = torch.load(first, weights_only=True)
    torch.save(state | {"seconds": 1e6}, second)  # of another run
    refused("step 2 after 1e+06 s in process 1")
    second.write_bytes(first.read_bytes()[:500])
    refused("an unreadable one in process 1")
    shutil.copy(first, second)
    assert ranks.run(2, command_apart, [*flags, "--resume"], tmp_path) == [(0, "")] * 2


def test_workers_change_nothing(tiny, tmp_path):
    settings = {**SMALL, "model": tiny, "steps": 3}
    (a, _), (b, _) = (train(0, 1, {**settings, "workers": workers}, tmp_path) for workers in (0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)


def command(*arguments, processes=1):
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"] if processes > 1 else []
    return [sys.executable, *launcher, "-m", "limber_fast", "train-clip", *map(str, arguments)]


def test_a_killed_command_goes_on(tiny, tmp_path, threads):
    """SIGKILL wherever it hits after a first checkpoint; the weights are those of a run that nobody killed."""
    threads(1)
    shared = ["--model", tiny, "--batch-size", "8", "--steps", "40", "--warmup", "2", "--save-every", "1"]
    shared += ["--threads", "1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    one = subprocess.Popen(command(*shared, "--output", parts), stdout=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while not (parts / "checkpoint.pt").exists() and one.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    one.send_signal(signal.SIGKILL)
    one.wait()
    step = load_checkpoint(parts / "checkpoint.pt", CLIP)["step"]
    assert 1 <= step < 40 and not (parts / "model.safetensors").exists()
    for arguments in ((parts, "--resume"), (whole,)):
        assert cli.main(["--quiet", "train-clip", *shared, "--output", *map(str, arguments)]) == 0
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


def test_ctrl_c_of_a_terminal_reaches_all_and_stops_cleanly(tiny, tmp_path):
    flags = ["--model", tiny, "--batch-size", 8, "--steps", 300, "--warmup", 2, "--save-every", 1, "--workers", 1]
    one = subprocess.Popen(command(*flags, "--output", tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           text=True, start_new_session=True)  # fmt: skip
    until = time.monotonic() + 240
    while not (tmp_path / "checkpoint.pt").exists() and one.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(one.pid, signal.SIGINT)
    said = one.communicate(timeout=240)[0]
    assert one.returncode == 130 and "stopped at step" in said and "Traceback" not in said, said


def test_torchrun(tiny, tmp_path):
    settings = ("--model", tiny, "--batch-size", 8, "--steps", 3, "--warmup", 1, "--output", tmp_path)
    done = subprocess.run(command(*settings, processes=2), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and "2 processes" in done.stdout, done.stderr
    assert (tmp_path / "train.csv").read_text().count("\n") == 4


def test_weights_load_into_open_clip(tiny, tmp_path):
    import open_clip

    assert cli.main(["--quiet", "train-clip", "--model", tiny, "--batch-size", "4", "--steps", "2", "--warmup", "0",
                     "--output", str(tmp_path)]) == 0  # fmt: skip
    model = open_clip.create_model("tiny-clip", pretrained=str(tmp_path / "model.safetensors"))
    trained = load_checkpoint(tmp_path / "checkpoint.pt", CLIP)["model"]
    assert all(torch.equal(x, trained[name]) for name, x in model.state_dict().items())


def test_dry_run_writes_nothing(tiny, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(f'model = "{tiny}"\nbatch_size = 6\nsteps = 30\nwarmup = 1\n')
    arguments = ["--config", str(tmp_path / "run.toml"), "--steps", "20", "--output", str(tmp_path / "out")]
    assert cli.main(["train-clip", *arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "(6, 3, 32, 32), (6, 12)" in shown and "20 steps" in shown and "MiB" in shown
    assert float(shown.partition("activations")[2].split()[0]) > 0
    assert not (tmp_path / "out").exists()
    assert cli.main(["train-clip", *arguments, "--micro-batch", "1", "--dry-run"]) == 0
    in_passes = capsys.readouterr().out
    assert "6 = 1 x 1 x 6 pairs" in shown and "6 = 1 x 6 x 1 pairs" in in_passes
    held, whole = (float(x.partition("activations")[2].split()[0]) for x in (in_passes, shown))
    assert 0 < held < whole


@pytest.mark.parametrize("arguments, message", [
    (["--model", "ViT-B-33"], "train-clip: model must be a name of open_clip.list_models"),
    (["--batch-size", "0"], "train-clip: batch_size must be at least 1; got 0"),
    (["--micro-batch", "-1"], "train-clip: micro_batch must not be negative; got -1"),
    (["--learning-rate", "inf"], "train-clip: learning_rate must be finite; got inf"),
    (["--seed", str(2**64)], "train-clip: seed must be a whole number of at least 0, below 2^64; got 18446744073709"),
    (["--loss", "triplet"], "train-clip: loss must be one of 'clip', 'siglip'; got 'triplet'"),
    (["--steps", "5", "--warmup", "5"], "train-clip: warmup must be less than steps = 5; got 5"),
    (["--loss", "siglip", "--label-smoothing", "0.1"], "train-clip: label_smoothing must be 0 with variant='sigmoid'"),
    (["--model", "nowhere.json"], "nowhere.json: no such file"),
])  # fmt: skip
def test_wrong_settings(arguments, message, tmp_path, capsys):
    assert cli.main(["train-clip", "--output", str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_checkpoint_of_other_settings_is_refused(tiny, tmp_path, capsys):
    shared = ["--quiet", "train-clip", "--model", tiny, "--steps", "2", "--warmup", "0", "--output", str(tmp_path)]
    assert cli.main([*shared, "--batch-size", "4"]) == 0
    assert cli.main([*shared, "--batch-size", "5", "--resume"]) == 1
    assert "batch_size must be the checkpoint's, 4; got 5" in capsys.readouterr().err
