"""`python -m hpcserve.engines.fake_server`."""

from __future__ import annotations

import sys

from .server import main

sys.exit(main())
