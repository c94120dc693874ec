"""What the scripts share. Nothing in this package imports a script: it takes tensors, arrays and callables.

CONTRIBUTING.md draws which module imports which.
"""

import logging
import os

# TensorFlow's C++ messages (CPU features, "cuInit failed" where there is no GPU) would bury ours; its Python errors
# still show. It reads this variable when it is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
logging.getLogger("tensorflow").setLevel(logging.ERROR)  # ten lines of its own beside our one on a damaged checkpoint
