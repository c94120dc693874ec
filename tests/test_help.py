import importlib
import re

import pytest

SCRIPTS = ["data_utils", "demo", "evaluate", "features", "inference", "model", "shapes", "tokenizer", "train"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_a_page_with_examples_defaults_and_units(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main(["--help"])
    assert ended.value.code == 0
    page = capsys.readouterr().out
    examples = re.findall(rf"^    python {script}\.py(.*?)(?: {{2,}}#.*)?$", page, re.MULTILINE)
    assert len(examples) >= 2
    for option in re.findall(r"--[\w-]+", " ".join(examples)):
        assert re.search(rf"^  {option}\b", page, re.MULTILINE), f"an example has {option}, which there is not"
    assert max(map(len, page.splitlines())) <= 115
    assert not re.search(r"--[\w-]+ [A-Z]+_[A-Z_]+", page), "a value that is called after its option says nothing"
