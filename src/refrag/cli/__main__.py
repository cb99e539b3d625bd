"""`python -m refrag.cli`."""

import sys

from . import main

sys.exit(main())
