"""The gap from 10, 30 and 100 probes beside the exact one (Table N.6).

python examples/paper/ablation_probes.py --data DIR [--seeds 42 43 44] [--epochs N]
python examples/paper/ablation_probes.py --quick
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples import each other by name

from paper.run import main

if __name__ == "__main__":
    main("ablation_probes", __doc__)
