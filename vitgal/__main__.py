"""`python -m vitgal`: see `vitgal.app.command_line`."""

import sys

from vitgal.app.command_line import main

if __name__ == "__main__":
    sys.exit(main())
