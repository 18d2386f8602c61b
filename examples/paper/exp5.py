"""Experiment 5: attention and a ReLU control on a toy regression (Table 7); needs no data.

python examples/paper/exp5.py --data DIR [--seeds 42 43 44] [--epochs N]
python examples/paper/exp5.py --quick
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples import each other by name

from paper.run import main

if __name__ == "__main__":
    main("exp5", __doc__)
