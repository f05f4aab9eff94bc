"""`python -m xlstm_rl`: the command line where its script is not on the path."""

import sys

from xlstm_rl.cli import main

sys.exit(main())
