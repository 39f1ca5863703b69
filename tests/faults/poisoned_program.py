"""A script with a prelude of poison.py, for processes that a launcher starts: poisoned_program.py memory 300,3,1 scripts/train.py ..."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import poison

getattr(poison, sys.argv[1])(*map(int, sys.argv[2].split(",")))
del sys.argv[:3]
runpy.run_path(sys.argv[0], run_name="__main__")
