"""`python -m mapo_fast` is the `mapo-fast` command, for machines without scripts on the path."""

import os
import sys

# `-m` puts the current folder first on the path: a torch.py or pydantic.py that lies there would be imported.
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 - imports nothing more
if not getattr(sys.flags, "safe_path", False) and os.path.abspath(sys.path[0]) != _ROOT:  # noqa: PTH100
    del sys.path[0]

from mapo_fast.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
