"""`python -m diptych` is the `diptych` command."""

import sys

from diptych.cli.main import main

sys.exit(main())
