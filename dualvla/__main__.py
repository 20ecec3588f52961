"""`python -m dualvla`, the same as the `dualvla` command."""

import sys

from dualvla.cli import main

sys.exit(main())
