"""Experiment 1: decay of R and C with distance in plain and residual MLPs (Table 2, figures 2 and 3).

python examples/paper/exp1.py --data DIR [--seeds 42 43 44] [--epochs N]
python examples/paper/exp1.py --quick
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples import each other by name

from paper.run import main

if __name__ == "__main__":
    main("exp1", __doc__)
