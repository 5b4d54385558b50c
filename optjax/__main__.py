"""`python -m optjax` is the command `optjax`."""

import sys

from optjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
