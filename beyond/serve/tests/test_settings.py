import pytest

from beyond.serve.settings import LIMITS, ServerConfig, is_loopback, parse_decoding
from captioning.base.cli import InputError
from captioning.config.settings import DecodeConfig


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.9.0.1", True), ("::1", True), ("[::1]", True), ("0.0.0.0", False), ("a.com", False)],
)
def test_is_loopback(host, expected):
    assert is_loopback(host) is expected


def test_trusted_hosts_are_names():
    assert ServerConfig().trusted_names == ()
    assert ServerConfig(trusted_hosts="Hub.example.com, .b.org").trusted_names == ("hub.example.com", ".b.org")


@pytest.mark.parametrize("text", ["a.com,", "https://a.com", "a.com:80", "*", "a..com"])
def test_trusted_hosts_refuse_other_text(text):
    with pytest.raises(InputError, match=r"--trusted-hosts: expected names such as hub\.example\.com, found "):
        ServerConfig(trusted_hosts=text)


def test_parse_decoding_begins_with_the_defaults():
    defaults = DecodeConfig(beam_size=5, max_words=20, length_penalty=0.5)
    assert parse_decoding([], defaults) == defaults
    pairs = [("beam_size", "3"), ("no_repeat", "True"), ("length_penalty", "2"), ("min_words", " 0 ")]
    expected = DecodeConfig(beam_size=3, max_words=20, length_penalty=2.0, no_repeat=True)
    assert parse_decoding(pairs, defaults) == expected


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("false", False), ("0", False)])
def test_parse_decoding_reads_yes_and_no(text, value):
    assert parse_decoding([("no_repeat", text)], DecodeConfig()).no_repeat is value


def test_parse_decoding_changes_between_searching_and_random_words():
    search = DecodeConfig(beam_size=5, captions=2)
    drawn = DecodeConfig(sample=True, temperature=0.5, top_p=0.9, decode_seed=3, captions=2)
    assert parse_decoding([("sample", "true")], search) == DecodeConfig(sample=True, captions=2)
    assert parse_decoding([("sample", "false")], drawn) == DecodeConfig(captions=2)
    assert parse_decoding([("beam_size", "4")], drawn) == DecodeConfig(beam_size=4, captions=2)
    assert parse_decoding([("temperature", "2")], drawn).top_p == 0.9


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("beam", "3")], "'beam' is no parameter; expected beam_size, "),
        ([("beam_size", "3"), ("beam_size", "3")], "beam_size: expected one value, found two"),
        ([("beam_size", "0")], "beam_size: expected a whole number of at least 1, found '0'"),
        ([("beam_size", "three")], "beam_size: expected a whole number of at least 1, found 'three'"),
        ([("beam_size", "")], "beam_size: expected a whole number of at least 1, found ''"),
        ([("beam_size", "9" * 5000)], "beam_size: expected a whole number"),
        ([("temperature", "nan"), ("sample", "1")], "temperature: expected a number"),
        ([("top_p", "inf"), ("sample", "1")], "top_p: expected a number"),
        ([("no_repeat", "maybe")], "no_repeat: expected true or false, found 'maybe'"),
        ([("sample", "true"), ("beam_size", "3")], "--sample .* --beam-size"),
        *(
            ([(name, str(limit + 1))], f"{name}: expected at most {limit} of this server")
            for name, limit in LIMITS.items()
        ),
    ],
)
def test_parse_decoding_refuses_other_values(pairs, message):
    with pytest.raises(InputError, match=message):
        parse_decoding(pairs, DecodeConfig())


def test_parse_decoding_takes_the_limits_and_keeps_defaults_that_exceed_them():
    for name, limit in LIMITS.items():
        assert getattr(parse_decoding([(name, str(limit))], DecodeConfig()), name) == limit
    assert parse_decoding([("captions", "2")], DecodeConfig(beam_size=50)).beam_size == 50
