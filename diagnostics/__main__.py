"""``python -m diagnostics``."""

import sys

from diagnostics.report.cli import main

sys.exit(main())
