"""What is built, packed and imported: each test in a process of its own, as a user would meet it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import limber_fast
from limber_fast import native
from limber_fast.dispatch import BackendUnavailable

ROOT = Path(__file__).resolve().parent.parent
CHECKOUT = ROOT / "setup.py"


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=os.environ | (env or {}), capture_output=True, text=True, timeout=120)


def python(code: str, cwd: Path, **env: str) -> str:
    """stdout of a fresh interpreter; its stderr is the failure."""
    done = run(sys.executable, "-c", code, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- import ---------------------------------------------------------------------------------------------------------


def test_kernels_is_a_subpackage_wherever_python_starts(tmp_path):
    for folder in (tmp_path, ROOT):
        found = Path(python("import limber_fast.kernels as k; print(k.__file__)", folder).strip())
        assert found.name == "__init__.py"
        assert found.parent in (ROOT / "kernels", Path(limber_fast.__file__).parent / "kernels")


def test_bare_kernels_says_what_to_import_instead():
    done = run(sys.executable, "-c", "import kernels", cwd=ROOT)
    assert done.returncode == 1
    assert "ImportError" in done.stderr and "import limber_fast.kernels" in done.stderr


def test_version_has_one_source():
    assert metadata.version("limber_fast") == limber_fast.__version__


def test_import_adds_nothing_to_torch_but_itself(tmp_path):
    code = """
import sys, json, torch
before = set(sys.modules)
import limber_fast
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps({
    "foreign": sorted(roots - sys.stdlib_module_names - {"torch", "limber_fast"}),
    "compilers": sorted({"torch._dynamo", "torch._inductor"} & set(sys.modules) - before),
    "native": sorted(name for name in sys.modules if name.startswith("limber_fast._c")),
    "cuda": torch.cuda.is_initialized(),
}))
"""
    assert json.loads(python(code, tmp_path)) == {"foreign": [], "compilers": [], "native": [], "cuda": False}


# --- native modules -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the loaded libraries are read from /proc")
def test_kernels_share_the_openmp_runtime_of_torch(tmp_path):
    code = """
from limber_fast import native
native.cpu()
from limber_fast.environment import openmp_libraries
print(*openmp_libraries())
"""
    (library,) = python(code, tmp_path).split()
    assert Path(library).name.startswith("libgomp")


def test_best_instruction_set_is_chosen_and_each_can_be_forced(tmp_path):
    isas = native.available_isas()
    assert isas and isas[0] == "baseline"
    code = "from limber_fast import native; print(native.cpu_isa(), native.cpu().__name__)"
    assert python(code, tmp_path, LIMBER_FAST_CPU_ISA="").split()[0] == isas[-1]
    for isa in isas:
        assert python(code, tmp_path, LIMBER_FAST_CPU_ISA=isa).split() == [isa, f"limber_fast._cpu_{isa}"]


def test_unknown_instruction_set_names_the_known_ones(monkeypatch):
    monkeypatch.setenv(native.ISA_VARIABLE, "sse9")
    with pytest.raises(BackendUnavailable, match="must be one of baseline, avx2, avx512, amx; got 'sse9'"):
        native.cpu()


OLD_CPU = "from limber_fast import native; native.cpu_features = lambda: {'avx2': True, 'fma': False, 'f16c': True}; "


def test_instruction_set_that_the_cpu_lacks_is_refused_by_name(tmp_path):
    code = "\ntry: native.cpu()\nexcept native.BackendUnavailable as error: print(error)"
    said = python(OLD_CPU + code, tmp_path, LIMBER_FAST_CPU_ISA="avx2")
    assert said.strip() == "LIMBER_FAST_CPU_ISA=avx2: this CPU lacks fma; usable here: baseline"


def test_old_cpu_gets_the_baseline(tmp_path):
    assert python(OLD_CPU + "print(native.cpu_isa())", tmp_path, LIMBER_FAST_CPU_ISA="").strip() == "baseline"


def test_module_that_was_not_built_is_an_error_at_the_call_with_its_remedy(tmp_path):
    code = """
import sys
sys.modules.update({f"limber_fast._cpu_{isa}": None for isa in ("baseline", "avx2", "avx512", "amx")})
from limber_fast import native
try: native.cpu()
except native.BackendUnavailable as error: print(error)
"""
    said = python(code, tmp_path, LIMBER_FAST_CPU_ISA="")
    assert "limber_fast._cpu_baseline was not built" in said and "C++17 compiler" in said and "pip install -v" in said


@pytest.fixture
def cuda_module():
    try:
        return native.cuda()
    except BackendUnavailable as error:
        pytest.skip(str(error))


def test_cuda_module_checks_arguments_before_the_device(cuda_module):
    assert re.fullmatch(r"sm_80( \w+)* compute_\d+", cuda_module.build()["targets"])
    for arguments, word in (((8, 16, 0, 1), "aligned"), ((16, 15, 0, 1), "multiple of 16"), ((16, 16, 0, 0), "blocks")):
        with pytest.raises(ValueError, match=word):
            cuda_module.read_words(*arguments, device=0, stream=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_module_without_a_device_passes_on_what_the_runtime_says(cuda_module):
    for call in (cuda_module.device_count, lambda: cuda_module.device_properties(0)):
        with pytest.raises(RuntimeError, match=r"cuda.* \(cudaError"):
            call()
    with pytest.raises(RuntimeError, match="cudaError"):
        cuda_module.read_words(16, 16, 16, 1, device=0, stream=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("words", [0, 4, 4096, 1_000_004, 2**27 + 4])
def test_read_words_reads_every_word_once(cuda_module, words):
    source = torch.randint(-(2**31), 2**31, (words,), dtype=torch.int32, device="cuda")
    partials = torch.full((264,), -1, dtype=torch.int32, device="cuda")
    stream = torch.cuda.current_stream()
    cuda_module.read_words(
        source.data_ptr(), 4 * words, partials.data_ptr(), 264, source.device.index, stream.cuda_stream
    )
    assert (partials.sum(dtype=torch.int64) - source.sum(dtype=torch.int64)) % 2**32 == 0


# --- packing --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare_machine(tmp_path_factory) -> dict[str, str]:
    """Neither compiler nor nvcc on PATH, and a torch that refuses to be imported: what a build must do without."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "torch.py").write_text("raise ImportError('the build imported torch')\n")
    missing = str(folder / "no-compiler")
    cleared = {name: "" for name in ("CUDA_HOME", "CUDA_PATH", "LIMBER_FAST_CUDA")}
    return cleared | {
        "PATH": str(folder),
        "PYTHONPATH": str(folder),
        "CC": missing,
        "CXX": missing,
        "LIMBER_FAST_CUDA": "auto",
    }


@pytest.fixture(scope="module")
def sdist(tmp_path_factory, bare_machine) -> Path:
    if not CHECKOUT.exists():
        pytest.skip("needs the source checkout")
    folder = tmp_path_factory.mktemp("sdist")
    done = run(
        sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(folder), cwd=ROOT, env=bare_machine
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def unpacked(sdist) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return next(path for path in sdist.parent.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def bare_wheel(unpacked, bare_machine) -> tuple[Path, str]:
    """A wheel built from the sdist on the bare machine, unpacked, and what its build printed."""
    done = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=unpacked, env=bare_machine)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (unpacked / "dist").glob("*.whl")
    site = unpacked.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site, done.stdout


def test_sdist_holds_every_tracked_file(unpacked):
    listed = run("git", "ls-files", cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    packed = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    tracked = {path for path in listed.stdout.splitlines() if (ROOT / path).exists()}
    assert tracked - packed <= {".gitignore"}
    assert not [path for path in packed if path.endswith((".so", ".pyc"))]


def test_wheel_without_a_compiler_says_what_it_skipped(bare_wheel):
    _, log = bare_wheel
    for module, reason in (("_cpu_baseline", "no-compiler"), ("_cuda", "no nvcc on PATH, and CUDA_HOME is not set")):
        assert re.search(rf"limber_fast\.{module}: skipped: .*{reason}", log)


def test_wheel_holds_the_package_and_its_data_only(bare_wheel):
    site, _ = bare_wheel
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"limber_fast"}
    packed = {path.relative_to(site) for path in site.rglob("*") if path.is_file()}
    assert Path("limber_fast/kernels/__init__.py") in packed
    data = {path.relative_to(ROOT) for path in (ROOT / "limber_fast" / "data").rglob("*") if path.is_file()}
    assert {path for path in data if path.suffix != ".pyc"} <= packed


def test_wheel_without_native_modules_computes_in_eager_pytorch(bare_wheel, tmp_path):
    site, _ = bare_wheel
    code = """
import sys
# The editable install under test would answer for the modules that this wheel lacks.
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
import torch, limber_fast, limber_fast.kernels
print(limber_fast.__file__)
x = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
print(float(limber_fast.info_nce(x, x, 10.0)))
try: limber_fast.info_nce(x, x, 10.0, backend="cpu")
except limber_fast.BackendUnavailable as error: print(error)
"""
    where, loss, *refusal = python(code, tmp_path, PYTHONPATH=str(site), LIMBER_FAST_CPU_ISA="").splitlines()
    assert Path(where).is_relative_to(site) and float(loss) > 0
    assert any("was not built" in line for line in refusal)


@pytest.mark.parametrize(("mode", "word"), [("1", "no nvcc"), ("yes", "must be 0, 1 or auto; got 'yes'")])
def test_cuda_that_is_demanded_and_impossible_fails_loudly(unpacked, bare_machine, mode, word):
    done = run(sys.executable, "setup.py", "build_ext", cwd=unpacked, env=bare_machine | {"LIMBER_FAST_CUDA": mode})
    assert done.returncode != 0 and word in done.stdout + done.stderr


def test_checks_have_one_function_of_a_name():
    """`limber_fast.checks` gathers all of its modules: of two functions of one name it would keep the later one."""
    import ast

    folder = Path(limber_fast.__file__).parent / "checks"
    names = [node.name for path in folder.glob("*.py") for node in ast.parse(path.read_text(encoding="utf-8")).body
             if isinstance(node, ast.FunctionDef)]  # fmt: skip
    assert len(names) > 50 and sorted(set(names)) == sorted(names)
