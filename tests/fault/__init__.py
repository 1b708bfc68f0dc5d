"""Runs that are disturbed on purpose. `python -m tests.fault.drill --help`"""

import sys
from pathlib import Path

# As pytest does it: tests/ is where `fakes` and `stores` are found.
sys.path.insert(0, str(Path(__file__).parents[1]))
