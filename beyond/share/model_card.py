"""The model card of a run: what it is, how it was trained and scored, and what it cannot do (Mitchell et al. 2019).

It is Markdown, made of what the run folder holds. What only the author knows is left as lines with TO FILL IN.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from captioning.base.cli import InputError
from captioning.config.options import Settings
from captioning.config.run_config import RunConfig
from captioning.config.settings import DecodeConfig

LICENCE = "TO FILL IN: the licence of these weights. Without one, nobody may use or share them."
CELLS = {"gru": "a GRU", "lstm": "an LSTM"}
LIMITS = """\
- The captions describe what the training captions describe, in their words. What they never mention, the model cannot
  name; the vocabulary has no other words.
- A caption can be wrong, and reads as sure as a right one: wrong objects, numbers, colours, places and actions. The
  confidence is the model's own, and is not the probability that a caption is right.
- Attention shows where the model looked for a word. It is no proof that the word is right, or why it was chosen.
- Images unlike those of the training (drawings, screenshots, X-rays, text, night, another country) get captions that
  sound like those of the training.
- Captions of people repeat what annotators assumed: gender, age, work and origin are guessed from looks. The images of
  usual datasets show some countries, people and kinds of homes far more often than others.
- An image is squeezed to a square of {size}x{size} pixels: small things and writing are lost.
- Not for decisions about people, for surveillance, or where a wrong caption does harm; as an alternative text only
  after a person has read it."""


@dataclasses.dataclass(frozen=True)
class PackedFile:
    """A file beside the card."""

    name: str
    num_bytes: int
    sha256: str


def make_card(
    name: str,
    config: RunConfig,
    metrics: Mapping[str, Mapping[str, Any]],
    weights_dtype: str,
    num_weights: int,
    files: Sequence[PackedFile],
    versions: Mapping[str, str],
) -> str:
    """Makes the model card.

    Args:
        name: that of the run.
        config: its settings, with names instead of paths.
        metrics: the content of every metrics_*.json, as evaluate.py wrote it, by the file's name.
        weights_dtype: of the packed weights.
        num_weights: numbers in the weights of the caption model.
        files: the other files of the pack.
        versions: of the software that packed the run, by its name.

    Returns:
        The text, in Markdown.

    Raises:
        InputError: a metrics file is none of evaluate.py.
    """
    scores = _describe_scores(metrics)  # first, since it checks what the others take
    sections = {
        "How to use it": _describe_use(name),
        "Data": _describe_data(config, metrics),
        "Settings": _describe_settings(config, weights_dtype, num_weights),
        "Scores": scores,
        "Limits and biases": LIMITS.format(size=config.cnn.image_size),
        "Licence": LICENCE,
        "Files": _describe_files(files),
        "Versions": f"Packed with {', '.join(f'{name} {version}' for name, version in versions.items())}.",
    }
    head = (
        f"# {name}\n\nAn image captioning model: it writes a sentence about an image, and shows for each word where in "
        f"the image it looked.\n{config.cnn.name} turns the image into features; {CELLS[config.model.cell]} with "
        f"{config.model.attention} attention writes one word after the other\n(Xu et al. 2015, [Show, Attend and "
        "Tell](https://arxiv.org/abs/1502.03044)). This card was generated from the run; lines\nwith TO FILL IN are "
        "the author's.\n"
    )
    return head + "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())


def _describe_use(name: str) -> str:
    """Returns the commands that caption with the pack."""
    return (
        f"```\npython inference.py --run {name}.zip photo.jpg\npython evaluate.py --run {name}.zip --split test    # "
        "and where the data are\n```\n\n"
        f'From Python: `inference.Captioner.load("{name}.zip").caption("photo.jpg").text`. '
        "Greedy search is the\ndefault; `--beam-size 5` searches longer."
    )


def _describe_data(config: RunConfig, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns what the model was trained on."""
    data = config.data
    source = f"the annotations `{data.annotations}`" if data.annotations else f"the dataset {data.dataset}"
    if data.official_val:
        split = "validation and test images are the official validation images"
    elif data.train_list or data.val_list:
        split = "by lists of image names"
    elif data.val_annotations or data.test_annotations:
        split = "by a file for each split"
    else:
        split = (
            "as the annotations have it, or else at random (seed "
            f"{data.split_seed}, {data.val_fraction:g} for validation, {data.test_fraction:g} for testing)"
        )
    counts = {str(scored["split"]): scored["images"] for scored in metrics.values() if "images" in scored}
    scored_images = ", ".join(f"{count:,} of {name}" for name, count in sorted(counts.items())) or "none"
    words = {"spaces": "what stands between spaces", "characters": "every character of scripts without spaces"}
    rows = [
        f"- Trained on {source}; captions used: {data.num_captions or 'all, or the default number of the dataset'}.",
        f"- Split: {split}. Images that were scored: {scored_images}.",
        f"- A word is {words[data.words]}, in lower case and without punctuation. The vocabulary has "
        f"{config.model.vocab_size:,} entries, with `<pad>`, `<unk>`, `<start>` and `<end>`.",
        f"- Images left out because they cannot be read: {len(config.unreadable_images):,}. "
        f"Fingerprint of images, splits and captions: `{config.data_fingerprint}`.",
        "- TO FILL IN: number of training images and captions, who made them, when, for what, and their licence.",
    ]
    return "\n".join(rows)


def _describe_settings(config: RunConfig, weights_dtype: str, num_weights: int) -> str:
    """Returns how the model was trained: all sizes, and the settings that are not the defaults."""
    features = config.features
    cnn = "its ImageNet weights"
    if "sha256" in features:
        kind = "random weights" if features["weights"] == "random" else "weights of the author's"
        cnn = f"{kind}, SHA-256 `{features['sha256']}`"
    changed = _list_settings(config.train, only_changed=True) or "nothing"
    rows = [
        f"- CNN: {features['cnn']} with {cnn}, {features['image_size']}x{features['image_size']} pixels; features in "
        f"{features['dtype']}. It was not trained further.",
        f"- Caption model: {num_weights:,} weights, stored as {weights_dtype}; {_list_settings(config.model)}.",
        f"- Training, where it differs from the defaults: {changed}.",
    ]
    return "\n".join(rows)


def _list_settings(settings: Settings, only_changed: bool = False) -> str:
    """Returns settings as `name value`, joined by commas."""
    values = settings.to_json().items()
    defaults = type(settings)().to_json()
    return ", ".join(f"{name} {value}" for name, value in values if not (only_changed and value == defaults[name]))


def _describe_scores(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table of scores, and how they were measured."""
    if not metrics:
        return "TO FILL IN: none were measured. `python evaluate.py --run RUN` writes them into the run folder."
    try:
        rows = [_score_row(scored) for _, scored in sorted(metrics.items())]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{', '.join(sorted(metrics))}: expected what evaluate.py writes ({error!r})") from None
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{table}\n\nIn percent, of captions that were generated without the people's captions they are compared with. "
        "Measured by pycocoevalcap\nafter the tokenizer of the table: scores after another one cannot be compared. If "
        "the epoch or the search was chosen by the\nscores of a split, those of that split are too good."
    )


def _score_row(scored: Mapping[str, Any]) -> dict[str, str]:
    """Returns a row of the table of scores, by the names of the columns."""
    names = {field.name for field in dataclasses.fields(DecodeConfig)}
    search = DecodeConfig(**{name: value for name, value in scored.items() if name in names})
    details = {
        f"length penalty {search.length_penalty:g}": search.num_beams > 1 and not search.sample,
        f"cut after {search.max_words} words": search.max_words is not None,
        f"no end before {search.min_words} words": search.min_words > 0,
        "no repetitions": search.no_repeat,
    }
    row = {
        "split": str(scored["split"]),
        "images": f"{scored['images']:,}",
        "search": ", ".join([search.describe(), *(text for text, is_set in details.items() if is_set)]),
        "tokenizer": str(scored["tokenizer"]),
    }
    return row | {name: f"{value:.1f}" for name, value in scored["scores"].items()}


def _describe_files(files: Sequence[PackedFile]) -> str:
    """Returns the table of files."""
    rows = "\n".join(f"| `{file.name}` | {file.num_bytes:,} | `{file.sha256}` |" for file in files)
    return f"| file | bytes | SHA-256 |\n| --- | --- | --- |\n{rows}"
