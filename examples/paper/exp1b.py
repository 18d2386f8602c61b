"""Experiment 1b: the same with spectral normalisation (Table N.2, figure N.1).

python examples/paper/exp1b.py --data DIR [--seeds 42 43 44] [--epochs N]
python examples/paper/exp1b.py --quick
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples import each other by name

from paper.run import main

if __name__ == "__main__":
    main("exp1b", __doc__)
