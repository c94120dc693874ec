import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_import_leaves_out_scikit_learn_which_can_be_imported_later():
    code = (
        "import sys; import captioning.base.quiet_tensorflow; print('sklearn' in sys.modules); "
        "from sklearn.feature_extraction.text import TfidfVectorizer"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
