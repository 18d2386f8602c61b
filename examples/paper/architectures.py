"""What the paper announces without measuring it: DenseNet, U-Net and GPT, each with the sources of its tensor part.

Resonance growth in a DenseNet, coupling across a U-Net's skips (Remark 74), attention in a trained GPT (Example 37).

python examples/paper/architectures.py --data DIR [--seeds 42 43 44] [--epochs N] [--only wiring=dense]
python examples/paper/architectures.py --quick
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples import each other by name

from paper.architecture_experiments import ARCHITECTURES
from paper.run import main

if __name__ == "__main__":
    main("architectures", __doc__, tuple(ARCHITECTURES.values()))
