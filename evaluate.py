"""Scores captions against what people wrote: BLEU-1 to 4, METEOR, ROUGE-L and CIDEr.

    python evaluate.py                                    # the newest run on its val split
    python evaluate.py --run runs/coco --split test

The captions are free-running: the model is given its own words, never the true ones. The scores are
computed by pycocoevalcap, the COCO challenge's code. METEOR, and the tokenizer behind the published
scores, need Java.
"""

from common import InputError, run_command, say, write_json  # before TensorFlow

import argparse
import contextlib
import io
import shutil
import subprocess
from pathlib import Path

import features
import tensorflow as tf

import data_utils
import inference
import model
from tokenizer import Tokenizer, split_words

JAVA_HINT = (
    "METEOR and the PTB tokenizer of published scores need Java (Debian, Ubuntu, Colab: "
    "apt-get install default-jre-headless)"
)


def has_java() -> bool:
    """Whether there is a Java that runs; macOS has a `java` that only says where to get one."""
    return bool(shutil.which("java")) and subprocess.run(["java", "-version"], capture_output=True).returncode == 0


def caption_examples(
    captioner: model.Captioner,
    words: Tokenizer,
    cache: features.FeatureCache,
    examples: list[data_utils.Example],
    batch_size: int = 64,
) -> list[inference.Caption]:
    """Captions pictures from their cached features."""
    paths = [str(cache.path(example.image)) for example in examples]
    batches = (
        tf.data.Dataset.from_tensor_slices(paths)
        .map(cache.read, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(batch_size)
        .prefetch(tf.data.AUTOTUNE)
    )
    return [caption for batch in batches for caption in inference.caption_features(captioner, words, batch)]


def score(references: list[list[str]], captions: list[str], java: bool) -> dict[str, float]:
    """Scores captions, each against its references, with pycocoevalcap.

    Args:
        references: for each picture, what people wrote.
        captions: one for each picture.
        java: whether to use what needs Java, the PTB tokenizer and METEOR. Otherwise both sides are split as the
            vocabulary is, which is quick and the same on every machine, and METEOR is left out.

    Returns:
        Scores in percent by name: BLEU-1 to BLEU-4, METEOR, ROUGE-L, CIDEr.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if java:
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        tokenize = PTBTokenizer().tokenize
    else:

        def tokenize(texts: dict) -> dict[int, list[str]]:
            return {i: [" ".join(split_words(text["caption"])) for text in rows] for i, rows in texts.items()}

    gts = tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(references)})
    res = tokenize({i: [{"caption": text}] for i, text in enumerate(captions)})
    with contextlib.redirect_stdout(io.StringIO()):  # pycocoevalcap prints its counts
        bleu = Bleu(4).compute_score(gts, res, verbose=0)[0]
        scores = {f"BLEU-{n}": value for n, value in enumerate(bleu, 1)}
        if java:
            scores["METEOR"] = Meteor().compute_score(gts, res)[0]
        scores["ROUGE-L"] = Rouge().compute_score(gts, res)[0]
        scores["CIDEr"] = Cider().compute_score(gts, res)[0]
    return {name: round(100 * float(value), 2) for name, value in scores.items()}


def summarise(captions: list[inference.Caption]) -> dict[str, float]:
    """What betrays a collapsed model: the share of distinct captions, and of captions that never ended, in percent."""
    distinct = len({caption.text for caption in captions}) / len(captions)
    endless = sum(not caption.ended for caption in captions) / len(captions)
    return {"distinct captions": round(100 * distinct, 1), "never ended": round(100 * endless, 1)}


def main(argv: list[str] | None = None) -> None:
    """Captions and scores a split of a run's data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder (default: the newest in runs/)")
    parser.add_argument(
        "--split", choices=data_utils.SPLITS, default="val", help="pictures to score (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    captioning = inference.Captioning.load(args.run or inference.newest_run())
    dataset = inference.dataset_of(captioning.config)
    examples = dataset.split(args.split)
    cache = features.cache_of(captioning.config["features"])
    if missing := cache.missing([example.image for example in examples]):
        raise InputError(
            f"{cache.folder}: no features of {len(missing):,} pictures (the first: {missing[0]}); run features.py "
            "with the data options of the run"
        )
    captions = caption_examples(captioning.captioner, captioning.words, cache, examples)
    java = has_java()
    if not java:
        say(f"{JAVA_HINT}: without it, words are split at spaces, and METEOR is left out")
    try:
        scores = score([list(example.captions) for example in examples], [caption.text for caption in captions], java)
    except (OSError, ValueError, AssertionError) as error:  # what pycocoevalcap raises when its Java programs fail
        raise InputError(f"scoring failed ({error!r}); METEOR needs a working Java and 2 GB of memory") from None
    scores |= summarise(captions)
    results = [{"image_id": e.image_id, "caption": c.text} for e, c in zip(examples, captions, strict=True)]
    write_json(captioning.run / f"captions_{args.split}.json", results)
    write_json(captioning.run / f"metrics_{args.split}.json", scores)
    print(f"{captioning.run}, {args.split}: {len(examples):,} pictures")
    for name, value in scores.items():
        print(f"{name:18} {value:6.1f}")


if __name__ == "__main__":
    run_command(main)
