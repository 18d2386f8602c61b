"""Experiment 3: the GN-Gap by activation, without layer norm (Tables 5 and N.5).

python examples/paper/exp3.py --data DIR [--seeds 42 43 44] [--epochs N]
python examples/paper/exp3.py --quick
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples import each other by name

from paper.run import main

if __name__ == "__main__":
    main("exp3", __doc__)
