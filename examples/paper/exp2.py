"""Experiment 2: a bottleneck on CIFAR-100, or the subset of it that is there (Tables 3 and N.1).

python examples/paper/exp2.py --data DIR [--seeds 42 43 44] [--epochs N]
python examples/paper/exp2.py --quick
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples import each other by name

from paper.run import main

if __name__ == "__main__":
    main("exp2", __doc__)
