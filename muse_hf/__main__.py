"""`python -m muse_hf` is the command `muse-hf`."""

import sys

from muse_hf.cli import main

sys.exit(main())
