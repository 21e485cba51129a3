"""`python -m kinoray` is `kinoray`."""

import sys

from kinoray.cli import main

if __name__ == "__main__":
    sys.exit(main())
