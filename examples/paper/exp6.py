"""Experiment 6: ResNet-18 with and without skip connections (Tables 8, 9, N.7 and N.8).

python examples/paper/exp6.py --data DIR [--seeds 42 43 44] [--epochs N]
python examples/paper/exp6.py --quick
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples import each other by name

from paper.run import main

if __name__ == "__main__":
    main("exp6", __doc__)
