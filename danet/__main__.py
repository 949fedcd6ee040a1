"""`python -m danet`: the command line where there is no script `danet`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
