"""Changes packed runs: files that lack, links, and weights, settings and vocabularies that are wrong."""

import hashlib
import io
import json
import stat
import zipfile

import numpy as np


def read_members(path):
    """Returns the content of every file of a .zip by its name."""
    with zipfile.ZipFile(path) as archive:
        return {member.filename: archive.read(member) for member in archive.infolist()}


def write_members(path, members):
    """Writes a .zip; members are contents by name, or by ZipInfo."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def edit(name, change):
    """Returns a damage that changes the content of a file."""
    return lambda members: {**members, f"small/{name}": change(members[f"small/{name}"])}


def edit_json(name, change):
    return edit(name, lambda content: json.dumps(change(json.loads(content))).encode())


def npz(**arrays):
    """Returns a damage that puts other arrays in the place of the weights, as they are."""

    def change(_):
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    return edit("weights.npz", change)


def edit_weights(change):
    """Returns a damage that changes the weights, which are arrays by name."""

    def change_file(content):
        file = io.BytesIO()
        np.savez(file, **change(dict(np.load(io.BytesIO(content)))))
        return file.getvalue()

    return edit("weights.npz", change_file)


def with_header(shape, version=0):
    """Returns a damage: weights that declare a shape which the file does not have."""

    def change(_):
        header = io.BytesIO()
        write = np.lib.format.write_array_header_2_0 if version else np.lib.format.write_array_header_1_0
        write(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("decoder/W.npy", header.getvalue() + bytes(64))
        return file.getvalue()

    return edit("weights.npz", change)


def add(name, content=b"x", **attributes):
    """Returns a damage that adds a file."""

    def damage(members):
        info = zipfile.ZipInfo(name)
        for key, value in attributes.items():
            setattr(info, key, value)
        return {**members, info: content}

    return damage


def rename(change):
    return lambda members: {change(name): content for name, content in members.items()}


def drop(name):
    return lambda members: {key: content for key, content in members.items() if key != f"small/{name}"}


def set_field(section, name, value):
    return edit_json("config.json", lambda values: {**values, section: {**values[section], name: value}})


def compress_weights(content):
    file = io.BytesIO()
    np.savez_compressed(file, **dict(np.load(io.BytesIO(content))))
    return file.getvalue()


DAMAGES = {
    "path out of the folder": (add("small/../evil.json"), "no file of a packed run"),
    "path of two folders up": (add("../../evil.json"), "no file of a packed run"),
    "absolute path": (add("/tmp/evil_of_the_test.json"), "no file of a packed run"),
    "path of Windows": (add("small\\evil.json"), "no file of a packed run"),
    "folder below": (add("small/checkpoints/best/checkpoint"), "no file of a packed run"),
    "second folder": (add("other/config.json"), "no file of a packed run"),
    "program": (add("small/run.py"), "no file of a packed run"),
    "pickle": (add("small/weights.pkl"), "no file of a packed run"),
    "second CNN": (lambda m: add("small/cnn.h5")(add("small/cnn.weights.h5")(m)), "found two"),
    "CNN that is not in the settings": (add("small/cnn.h5"), "expected the CNN's weights if"),
    "link": (add("small/cnn.h5", external_attr=(stat.S_IFLNK | 0o777) << 16), "found a link"),
    "link in the place of a file": (
        lambda m: add("small/history.csv", b"/etc/passwd", external_attr=0o120777 << 16)(drop("history.csv")(m)),
        "found a link",
    ),
    "device": (add("small/cnn.h5", external_attr=stat.S_IFCHR << 16), "found a link or a device"),
    "folder is hidden": (rename(lambda name: name.replace("small/", ".ssh/")), "expected a folder with"),
    "folder is above": (rename(lambda name: name.replace("small/", "../")), "expected a folder with"),
    "folder has no name": (rename(lambda name: name.replace("small/", "/")), "expected a folder with"),
    "no folder": (rename(lambda name: name.replace("small/", "")), "no file of a packed run"),
    "no file": (lambda _: {}, "expected a folder with"),
    "no settings": (drop("config.json"), "expected a folder with"),
    "no vocabulary": (drop("vocabulary.json"), "expected a folder with"),
    "no weights": (drop("weights.npz"), "expected a folder with"),
    "settings are no JSON": (edit("config.json", lambda _: b"\xff\xfe"), "expected JSON"),
    "settings are a list": (edit("config.json", lambda _: b"[]"), "not the config.json of a run"),
    "settings of another version": (edit_json("config.json", lambda c: {**c, "format": 99}), "a later version"),
    "settings with a path": (set_field("data", "annotations", "/etc/passwd"), "found paths"),
    "settings with a relative path": (set_field("features", "folder", "../../.."), "found paths"),
    "settings with a folder of data": (set_field("data", "data_dir", "data"), "found paths"),
    "settings with other units": (set_field("model", "units", 7), "no weights of size 7"),
    "settings with a huge size": (set_field("model", "embedding_dim", 10**12), "no weights of size 1000000000000"),
    "settings with another CNN": (set_field("features", "sha256", "00"), "expected the CNN's weights if"),
    "weights of another CNN": (
        lambda m: set_field("features", "sha256", "00")(add("small/cnn.h5")(m)),
        "not the weights of the CNN that computed the features",
    ),
    "vocabulary is a number, and so do the settings": (
        lambda m: edit_json("config.json", lambda c: {**c, "vocabulary_sha256": hashlib.sha256(b"5").hexdigest()})(
            edit("vocabulary.json", lambda _: b"5")(m)
        ),
        "not that of config.json",
    ),
    "another vocabulary": (
        edit_json("vocabulary.json", lambda words: [*words[:-1], "other"]),
        "not that of config.json",
    ),
    "vocabulary is an object": (edit("vocabulary.json", lambda _: b"{}"), "not that of config.json"),
    "vocabulary is a number": (edit("vocabulary.json", lambda _: b"5"), "not that of config.json"),
    "weights are text": (edit("weights.npz", lambda _: b"text"), "not a zip file"),
    "weights are cut": (edit("weights.npz", lambda content: content[: len(content) // 2]), "not a zip file"),
    "weights have a flipped bit": (
        edit("weights.npz", lambda c: c[:2000] + bytes([c[2000] ^ 1]) + c[2001:]),
        "CRC|Bad|expected",
    ),
    "weights are compressed": (edit("weights.npz", compress_weights), "not an array of weights"),
    "weights are none": (npz(), "expected from 1 to"),
    "weights are pickled": (npz(W=np.array([{"a": 1}], object)), "found .* object"),
    "weights are integers": (npz(W=np.zeros(4, np.int64)), "found .* int64"),
    "weights are float64": (npz(W=np.zeros(4)), "found .* float64"),
    "weights are in Fortran order": (npz(W=np.ones((3, 2), np.float32, order="F")), "of the size of the file"),
    "weights are no numbers": (npz(W=np.array([np.nan], np.float32)), "expected finite weights"),
    "weights are infinite": (npz(W=np.array([np.inf], np.float16)), "expected finite weights"),
    "weights are of another model": (npz(W=np.zeros((5, 6), np.float32)), "no weights of size"),
    "weights declare a huge shape": (with_header((2**40, 2**20)), "of the size of the file"),
    "weights declare a negative shape": (with_header((-4, -4)), "of the size of the file"),
    "weights declare a larger shape": (with_header((17,)), "of the size of the file"),
    "weights have another header": (with_header((16,), version=2), "expected version 1.0"),
    "weights have a path": (
        edit_weights(lambda w: {"../evil": np.zeros(2, np.float32), **w}),
        "not an array of weights",
    ),
    "weights have a name that is a folder": (
        edit_weights(lambda w: {**w, "decoder": np.zeros(2, np.float32)}),
        "expected an array or a folder",
    ),
}
