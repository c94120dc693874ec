"""Every path that a user may name, with characters that shells, patterns and formats treat specially."""

import os
import sys
from pathlib import Path

import pytest
from helpers.quick_commands import quick_commands

import beyond.export.__main__ as export
import beyond.share.__main__ as share
import evaluate
import inference
import train
from captioning.data import shapes

NAMES = [r"a [1] b\c {d}", "%e *?  '&' # über größe", "\udcff"]  # the last one is no Unicode

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")]


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_commands():
        yield


@pytest.mark.parametrize("name", NAMES)
def test_paths_of_any_name_work_from_training_to_caption(tmp_path, monkeypatch, capsys, name):
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # as it is outside pytest
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache {name}"))
    place = tmp_path / name
    place.mkdir()
    monkeypatch.chdir(place)
    shapes.draw_dataset("shapes", num_images=12)
    os.rename("shapes", name)
    os.rename(f"{name}/dataset_shapes.json", f"{name}/{name}.json")
    Path(f"{name}.h5").write_text("stands for weights")
    data = [f"--annotations={name}/{name}.json", f"--images={name}", f"--cnn-weights={name}.h5"]
    sizes = ["--embedding-dim=8", "--units=16", "--max-length=6", "--batch-size=8"]
    run = Path("runs", name)
    for epochs in (1, 2):
        train.main([*data, f"--features-dir=f {name}", *sizes, f"--epochs={epochs}", f"--run={run}"])
    assert "after 1 epochs and 0 batches" in capsys.readouterr().err, "the second time it resumes"
    image = f"{name}/{name}.png"
    os.rename(f"{name}/images/shapes_00000.png", image)
    outputs = [f"--csv={name}.csv", f"--grid=grid {name}.png", f"--output-dir=plots {name}", "--plots"]
    inference.main([*outputs, "--", image])  # of the latest run
    assert all(map(os.path.getsize, (f"{name}.csv", f"grid {name}.png"))) and any(Path(f"plots {name}").iterdir())
    evaluate.main([f"--run={run.absolute()}", "--split=val", f"--per-image=scores {name}.csv"])
    share.main([f"--run={run}", f"--output={name}.zip"])
    inference.main([f"--run={name}.zip", "--", image])
    export.main([f"--run={run}", f"--output=export {name}"])
