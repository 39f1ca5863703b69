"""qlora_suite: the parts that the scripts are made of. Each file holds one idea and is named for it."""

import logging

# On import bitsandbytes reports as a failure that it found no hub kernels for the CPU. Its own are used, which is what we want.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
