"""A script under a config that is made for GPUs, on CPU processes:

accelerate launch --config_file accelerate_configs/fsdp.yaml --num_processes 2 tests/on_cpu.py scripts/train.py RECIPE ...
"""

import runpy
import sys

from qlora_suite.engine import stand_in_for_gpus

stand_in_for_gpus()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
