"""`python -m limber_fast`: the console script `limber-fast`."""

import sys

from limber_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
