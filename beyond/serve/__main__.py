"""Serves a page on this machine: drop an image on it, or take one, and see its caption and where the model looked.

Tutorial section: none. It needs `pip install werkzeug waitress`.

    python -m beyond.serve                                       # the latest run, at http://127.0.0.1:8000/
    python -m beyond.serve --run runs/coco --beam-size 5 --port 0
    python -m beyond.serve --host 0.0.0.0 --max-requests 16      # for all machines that reach this one
    python -m beyond.serve --trusted-hosts hub.example.com       # behind a proxy of that name

Programs send an image to POST /caption, its bytes or a form, and get JSON: the caption, its confidence, and the
probability and attention of each word. The options of decoding are the defaults of parameters of the same names:

    curl -F image=@photo.jpg "http://127.0.0.1:8000/caption?beam_size=5&captions=3"

Ctrl-C ends it. It has no password and no https: it is made for one machine and a few people, not for the internet.
"""

import argparse
import importlib.util

import numpy as np

from beyond.serve.settings import ServerConfig
from captioning.base.cli import InputError, add_quiet_option, log, make_parser, run_main
from captioning.config.options import add_options
from captioning.config.settings import DecodeConfig
from captioning.images.reading import set_max_megapixels
from inference import Captioner, add_model_options


def compile_captioner(captioner: Captioner) -> None:
    """Compiles the CNN and the decoder, so that the first request does not wait for it.

    Raises:
        InputError: the CNN cannot be built.
    """
    size = captioner.image_size
    for batch_size in (2, 3, 1):  # TensorFlow compiles for two images, and then for any number
        captioner.caption_pixels(np.zeros((batch_size, size, size, 3), np.uint8))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__)
    group = parser.add_argument_group("server")
    add_options(group, ServerConfig)
    add_quiet_option(group)
    add_model_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Serves the page until Ctrl-C."""
    args = parse(argv)
    if missing := [name for name in ("werkzeug", "waitress") if importlib.util.find_spec(name) is None]:
        raise InputError(f"the server needs {' and '.join(missing)}; run `pip install werkzeug waitress`")
    from beyond.serve import server  # here, since it imports them

    config, decode_config = ServerConfig.from_args(args), DecodeConfig.from_args(args)
    set_max_megapixels(config.max_megapixels)
    with server.listen(config) as listener:  # first, since a port in use is known at once
        captioner = Captioner.load(args.run, decode_config)
        log(f"run: {captioner.run}")
        compile_captioner(captioner)
        if not config.is_local:
            text = "anybody who reaches this machine can caption with it; there is no password"
            log(f"--host {config.host}: {text}", error=True)
        app = server.CaptionApp(captioner, config)
        print(server.page_url(listener), flush=True)
        server.run(app, server.make_server(app, listener))
    log("stopped")


if __name__ == "__main__":
    run_main(main)
