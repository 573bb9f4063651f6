"""``python -m molf``."""

import sys

from .cli import main

sys.exit(main())
