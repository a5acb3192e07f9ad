"""`accelerate launch -m vitgal.training PARAMS.yaml`: see `vitgal.app.train_command`."""

import sys

from vitgal.app.train_command import main

if __name__ == "__main__":
    sys.exit(main())
