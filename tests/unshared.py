"""scripts/train.py with an output.dir of its own for every rank, as on nodes that share no disk: unshared.py FOLDER train.py ..."""

import os
import runpy
import sys

from qlora_suite import run_folder
from qlora_suite.engine import stand_in_for_gpus

stand_in_for_gpus()
run_folder.SEEN_WITHIN_SECONDS = 1.0
folder = sys.argv[1]
del sys.argv[:2]
sys.argv.append(f"output.dir={folder}/rank{os.environ['RANK']}")
runpy.run_path(sys.argv[0], run_name="__main__")
