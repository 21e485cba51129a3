"""`python -m kinoray` is `kinoray`: nothing is imported from the working folder, which may be a stranger's library."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # Python puts the working folder there

from kinoray.cli import main

if __name__ == "__main__":
    main()
