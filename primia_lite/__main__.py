"""``python -m primia_lite``: the ``primia-lite`` command."""

import sys

from primia_lite.apps.cli import main

sys.exit(main())
