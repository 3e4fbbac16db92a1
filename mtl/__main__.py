"""`python -m mtl` is `mtl`."""

import sys

from mtl.cli import main

if __name__ == "__main__":
    sys.exit(main())
