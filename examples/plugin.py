"""The plug-in, for scripts that are nothing without it; or one sentence that it is missing."""

import sys

try:
    import muse_hf
except ImportError as error:
    print(f"error: muse_hf cannot be imported ({error}); pip install -e . installs it.", file=sys.stderr)
    sys.exit(2)

__all__ = ["muse_hf"]
