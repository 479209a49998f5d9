"""`python -m ta_llava.cli` is `ta-llava`, for example under `torchrun`."""

import sys

from . import app


if __name__ == "__main__":
    sys.exit(app())
