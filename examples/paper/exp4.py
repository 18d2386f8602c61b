"""Experiment 4: two branches and their merge (Tables 6 and N.4, figure N.2).

python examples/paper/exp4.py --data DIR [--seeds 42 43 44] [--epochs N]
python examples/paper/exp4.py --quick
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples import each other by name

from paper.run import main

if __name__ == "__main__":
    main("exp4", __doc__)
