"""The gap at initialisation against the labels of the measured batch, on the networks of Table 5.

python examples/paper/labels.py --data DIR
python examples/paper/labels.py --quick
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples import each other by name

from paper.label_experiment import LABELS
from paper.run import main

if __name__ == "__main__":
    main("labels", __doc__, [LABELS])
