import numpy as np
import pytest
import tensorflow as tf

from captioning.base.cli import InputError
from captioning.base.files import file_sha256, write_json
from captioning.images.feature_cache import (
    CNN_FILE,
    MANIFEST_FILE,
    FeatureCache,
    check_cnn_weights,
    check_manifest,
    find_cnn_weights,
    find_outdated,
    make_manifest,
    open_run_cache,
    read_batches,
    read_manifest,
)
from captioning.images.image_records import ImageRecords


@pytest.fixture
def run_manifest(cache):
    """The manifest of a cache on the disk, as a run's config.json holds it."""
    write_json(cache.folder / MANIFEST_FILE, cache.manifest)
    return {**cache.manifest, "folder": str(cache.folder)}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cache_stores_dtype_of_manifest(cache, rng, dtype):
    typed_cache = FeatureCache(cache.folder, {**cache.manifest, "dtype": dtype})
    values = rng.normal(size=(64, 2048))
    typed_cache.write("sub/a.jpg", values)
    assert typed_cache.missing(["sub/a.jpg"]) == []
    path = typed_cache.path("sub/a.jpg")
    np.testing.assert_array_equal(np.load(path), values.astype(dtype))
    features = typed_cache.read(tf.constant([str(path)] * 2))
    assert features.dtype == dtype
    np.testing.assert_array_equal(features, [values.astype(dtype)] * 2)


def test_cache_missing_reports_files_that_are_no_features(cache):
    cache.write("a.jpg", np.zeros((64, 2048)))
    impossible = ["x" * 5000, "a\0b"]
    assert cache.missing(["a.jpg", "b.jpg", *impossible]) == ["b.jpg", *impossible]
    cache.path("a.jpg").write_bytes(cache.path("a.jpg").read_bytes()[:-1])
    assert cache.missing(["a.jpg"]) == ["a.jpg"]
    np.save(cache.path("a.jpg"), np.zeros((2048, 64), np.float16))  # of the right size
    assert cache.missing(["a.jpg"]) == ["a.jpg"]


def test_cache_cnn_weights_names_file_of_random_weights(cache):
    assert cache.cnn_weights == "imagenet"
    random_cache = FeatureCache(cache.folder, {**cache.manifest, "weights": "random"})
    assert random_cache.cnn_weights == str(cache.folder / CNN_FILE)


def test_read_batches_reads_in_order_and_names_what_it_cannot_read(cache, rng):
    values = rng.normal(size=(20, 64, 2048)).astype(np.float16)
    for number, features in enumerate(values):
        cache.write(f"{number}.jpg", features)
    names = [f"{number}.jpg" for number in range(20)]
    np.testing.assert_array_equal(np.concatenate(list(read_batches(cache, names, 2))), values)
    cache.path("7.jpg").unlink()
    with pytest.raises(InputError, match=r"7\.jpg\.npy: these features are gone .*No such file"):
        list(read_batches(cache, names, 2))


def test_find_outdated_finds_missing_damaged_and_changed_features(cache, tmp_path, capsys):
    names = ["missing.jpg", "damaged.jpg", "good.jpg", "changed.jpg"]
    for name in names:
        (tmp_path / name).write_text(name)
        cache.write(name, np.zeros((64, 2048)))
    records = ImageRecords(cache.folder, tmp_path)
    for name in names:
        records.note(name)
        records.add(name)
    assert find_outdated(cache, records, names) == [] and capsys.readouterr().err == ""
    cache.path("missing.jpg").unlink()
    cache.path("damaged.jpg").write_text("damaged")
    (tmp_path / "changed.jpg").write_text("a longer text")
    assert find_outdated(cache, records, names) == ["missing.jpg", "damaged.jpg", "changed.jpg"]
    assert capsys.readouterr().err.splitlines() == [
        f"features: {cache.path('damaged.jpg')} is damaged and will be computed again",
        "features: 1 images have changed and will be computed again, the first: changed.jpg",
    ]


# The manifest.


def test_make_manifest_identifies_file_by_content(tmp_path):
    (tmp_path / "cnn.h5").write_text("weights")
    manifest = make_manifest(tmp_path / "cache", tmp_path / "images", str(tmp_path / "cnn.h5"), "float32")
    assert manifest == {
        "cnn": "InceptionV3",
        "weights": str(tmp_path / "cnn.h5"),
        "image_size": 299,
        "shape": [64, 2048],
        "dtype": "float32",
        "images": "../images",
        "sha256": file_sha256(tmp_path / "cnn.h5"),
    }
    check_manifest(manifest)
    assert "sha256" not in make_manifest(tmp_path, tmp_path, "imagenet", "float16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype: expected float16 or float32, found 'int8'"),
        ({"image_size": "299"}, "image_size: expected int"),
        ({"weights": "random"}, "sha256 is missing"),
        ({"precision": "int8"}, "precision: expected float32, tf32, float16, found 'int8'"),
    ],
)
def test_check_manifest_rejects_wrong_field(cache, changes, message):
    check_manifest(cache.manifest)
    with pytest.raises(InputError, match=message):
        check_manifest({**cache.manifest, **changes})


def test_read_manifest_names_file(tmp_path):
    with pytest.raises(InputError, match=rf"{MANIFEST_FILE}: no such file"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text("[]")
    with pytest.raises(InputError, match=rf"{MANIFEST_FILE}: not the manifest of a feature cache \(expected the field"):
        read_manifest(tmp_path)


def test_open_run_cache_opens_folder_of_run(run_manifest, cache):
    cache.write("a.jpg", np.zeros((64, 2048)))
    run_cache = open_run_cache({**run_manifest, "images": "moved"})
    assert run_cache.folder == cache.folder and run_cache.missing(["a.jpg", "b.jpg"]) == ["b.jpg"]


@pytest.mark.parametrize(("key", "value"), [("cnn", "Other"), ("image_size", 224), ("dtype", "float32")])
def test_open_run_cache_rejects_changed_manifest(run_manifest, key, value):
    with pytest.raises(InputError, match=rf"its {key} is .*, that of the run's config\.json {value}"):
        open_run_cache({**run_manifest, key: value})


def test_open_run_cache_rejects_other_weights(run_manifest, cache):
    with pytest.raises(InputError, match="its weights is imagenet"):
        open_run_cache({**run_manifest, "weights": "random"})
    write_json(cache.folder / MANIFEST_FILE, {**cache.manifest, "weights": "one.h5", "sha256": "1"})
    open_run_cache({**run_manifest, "weights": "same.h5", "sha256": "1"})  # the same bytes under another name
    with pytest.raises(InputError, match="its sha256 is 1"):
        open_run_cache({**run_manifest, "weights": "one.h5", "sha256": "2"})


# The weights of the CNN.


def test_check_cnn_weights_rejects_missing_file(tmp_path):
    check_cnn_weights("imagenet")
    check_cnn_weights("random")
    with pytest.raises(InputError, match=r"none\.h5: no such weights file; expected imagenet, random, or a file"):
        check_cnn_weights(str(tmp_path / "none.h5"))


def test_check_cnn_weights_compares_sha256(tmp_path):
    path = tmp_path / "cnn.h5"
    path.write_text("weights")
    check_cnn_weights(str(path))
    check_cnn_weights(str(path), file_sha256(path))
    for cnn_weights in (str(path), "random"):
        with pytest.raises(InputError, match="not the weights of the CNN that computed the features, whose SHA-256 is"):
            check_cnn_weights(cnn_weights, "0" * 64)


def test_find_cnn_weights_returns_file_of_run(tmp_path):
    assert find_cnn_weights(tmp_path) is None
    (tmp_path / CNN_FILE).write_text("weights")
    assert find_cnn_weights(tmp_path) == str(tmp_path / CNN_FILE)
