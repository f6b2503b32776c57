"""Triton kernels, one file per op. This folder is the package `limber_fast.kernels` (see `package_dir` in setup.py)."""

if __name__ != "limber_fast.kernels":
    raise ImportError(
        "this folder is the package `limber_fast.kernels`; it answers to `kernels` only because the repository root is "
        "on sys.path. Run `pip install -e .`, then `import limber_fast.kernels`"
    )
