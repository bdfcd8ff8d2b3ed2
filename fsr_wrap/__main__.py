"""`python -m fsr_wrap`, the same as the command `fsr-wrap`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
