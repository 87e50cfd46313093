"""LoRA: read, attach, merge, train and write; every format, nothing dropped without a word."""
