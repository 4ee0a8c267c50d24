"""Trains everyone on equal terms: `python -m benchmarks.train --help`.

Nothing else stands here: every process of a run reads this file anew, and must not
meet code that was changed meanwhile.
"""

import sys

from benchmarks.training.command import main

if __name__ == "__main__":
    sys.exit(main())
