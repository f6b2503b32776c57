"""Prints what pyproject.toml requires, with the extras named as arguments: one requirement a line, for pip's -r.

`make` installs them while the native modules compile, which one `pip install -e '.[...]'` does one after the other.
"""

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pip brings its own
    from pip._vendor import tomli as tomllib

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *(line for extra in sys.argv[1:] for line in extras[extra]), sep="\n")
