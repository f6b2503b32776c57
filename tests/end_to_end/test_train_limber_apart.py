"""`limber-fast train-limber` under torchrun where every process has an output folder of its own."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("timm")

SCRIPT = """
import os, sys
from limber_fast import cli
sys.exit(cli.main([*sys.argv[1:], "--output", f"rank{os.environ['RANK']}"]))
"""


@pytest.fixture
def train(config, tmp_path):
    """train(*options, **changes of the settings) -> (exit code, errors)."""
    (tmp_path / "apart.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "apart.py"]

    def run(*options, **changes):
        settings = dataclasses.replace(config, **changes).to_dict()
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
        (tmp_path / "run.toml").write_text("\n".join(lines))
        done = subprocess.run([*launch, "train-limber", "--config", "run.toml", *options], capture_output=True,
                              text=True, timeout=400, cwd=tmp_path,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        return done.returncode, " ".join(done.stderr.split())

    return run


def test_they_train_but_do_not_go_on(train, tmp_path):
    changes = {"cache_features": False, "steps": 3}
    assert train(**changes)[0] == 0
    assert (tmp_path / "rank0" / "checkpoint.pt").exists() and not (tmp_path / "rank1" / "checkpoint.pt").exists()
    code, said = train("--resume", **changes)
    assert code == 1 and "the file must be the same for all processes; got step 3 after" in said
    assert "in process 0 and none in process 1; share the output folder" in said


def test_cached_features_need_one_folder(train, tmp_path):
    says = "train-limber: output must be a folder that all processes share, as cache_features has the features in"
    code, said = train()
    assert code == 1 and says in said and "another one in process 1" in said and "No such file" not in said
    assert not list((tmp_path / "rank0").glob(".*"))
    (tmp_path / "rank1").rmdir()
    (tmp_path / "rank1").symlink_to(tmp_path / "rank0")  # shared after all
    assert train(steps=3)[0] == 0
    (tmp_path / "rank1").unlink()
    code, said = train(steps=3)  # what is made already is in one of them alone
    assert code == 1 and says in said
