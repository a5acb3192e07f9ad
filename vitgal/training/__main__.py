"""`accelerate launch -m vitgal.training PARAMS.yaml`: see `vitgal.app.train_command`."""

import os
import sys

from vitgal.app.train_command import main

if __name__ == "__main__":
    status = main()
    if status == os.EX_TEMPFAIL:
        # Python's teardown of torch takes seconds, and a scheduler may kill the process before.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
