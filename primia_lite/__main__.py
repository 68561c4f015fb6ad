"""``python -m primia_lite``: the ``primia-lite`` command."""

import sys

from primia_lite.cli import main

sys.exit(main())
