"""qlora_suite: the parts that the scripts are made of. Each file holds one idea and is named for it."""
