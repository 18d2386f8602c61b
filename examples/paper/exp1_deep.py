"""Experiment 1, deep: 16 to 32 blocks (Table N.3).

python examples/paper/exp1_deep.py --data DIR [--seeds 42 43 44] [--epochs N]
python examples/paper/exp1_deep.py --quick
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples import each other by name

from paper.run import main

if __name__ == "__main__":
    main("exp1_deep", __doc__)
