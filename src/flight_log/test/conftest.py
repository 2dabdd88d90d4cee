"""Lets the tests import the bag writer for synthetic trials that stands beside them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
