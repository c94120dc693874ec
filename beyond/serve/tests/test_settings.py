import pytest

from beyond.serve.settings import LIMITS, ServerConfig, parse_decoding
from captioning.base.cli import InputError
from captioning.config.settings import DecodeConfig


def test_trusted_hosts_are_names():
    assert ServerConfig().trusted_names == ()
    assert ServerConfig(trusted_hosts="Hub.example.com, .b.org").trusted_names == ("hub.example.com", ".b.org")
    for text in ("a.com,", "https://a.com", "a.com:80", "*"):
        with pytest.raises(InputError, match=r"--trusted-hosts: expected names such as hub\.example\.com, found "):
            ServerConfig(trusted_hosts=text)


def test_parse_decoding_begins_with_the_defaults():
    defaults = DecodeConfig(beam_size=50, max_words=20, length_penalty=0.5)
    assert parse_decoding([], defaults) == defaults, "limits are for requests"
    pairs = [("beam_size", "3"), ("no_repeat", "True"), ("length_penalty", "2"), ("min_words", " 0 ")]
    expected = DecodeConfig(beam_size=3, max_words=20, length_penalty=2.0, no_repeat=True)
    assert parse_decoding(pairs, defaults) == expected
    assert not parse_decoding([("no_repeat", "0")], DecodeConfig(no_repeat=True)).no_repeat


def test_parse_decoding_changes_between_searching_and_random_words():
    search = DecodeConfig(beam_size=5, captions=2)
    drawn = DecodeConfig(sample=True, temperature=0.5, top_p=0.9, decode_seed=3, captions=2)
    assert parse_decoding([("sample", "true")], search) == DecodeConfig(sample=True, captions=2)
    assert parse_decoding([("sample", "false")], drawn) == DecodeConfig(captions=2)
    assert parse_decoding([("beam_size", "4")], drawn) == DecodeConfig(beam_size=4, captions=2)
    assert parse_decoding([("temperature", "2")], drawn).top_p == 0.9


def test_parse_decoding_chooses_by_consensus_only_where_the_server_does():
    server = DecodeConfig(choose="consensus")
    assert parse_decoding([("captions", "2")], server) == DecodeConfig(choose="consensus", captions=2)
    assert parse_decoding([("choose", "probability")], server) == DecodeConfig()
    assert parse_decoding([("sample", "true")], server) == DecodeConfig(sample=True)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("choose", "foo")], "choose: expected probability or consensus, found 'foo'"),
        ([("choose", "consensus")], "choose: this server was started without --choose consensus; expected probability"),
        ([("beam", "3")], "'beam' is no parameter; expected beam_size, "),
        ([("beam_size", "3"), ("beam_size", "3")], "beam_size: expected one value, found two"),
        ([("beam_size", "0")], "beam_size: expected a whole number of at least 1, found '0'"),
        ([("beam_size", "")], "beam_size: expected a whole number of at least 1, found ''"),
        ([("beam_size", "9" * 5000)], "beam_size: expected a whole number"),
        ([("temperature", "nan"), ("sample", "1")], "temperature: expected a number"),
        ([("no_repeat", "maybe")], "no_repeat: expected true or false, found 'maybe'"),
        ([("sample", "true"), ("beam_size", "3")], "--sample .* --beam-size"),
    ],
)
def test_parse_decoding_refuses_other_values(pairs, message):
    with pytest.raises(InputError, match=message):
        parse_decoding(pairs, DecodeConfig())


def test_parse_decoding_has_limits():
    for name, limit in LIMITS.items():
        others = [("max_words", "100")] * (name == "min_words")
        assert getattr(parse_decoding([(name, str(limit)), *others], DecodeConfig()), name) == limit
        with pytest.raises(InputError, match=f"{name}: expected at most {limit} of this server, found {limit + 1}"):
            parse_decoding([(name, str(limit + 1)), *others], DecodeConfig())


def test_parse_decoding_takes_what_the_server_was_started_with():
    """The page sends it, unless its sliders are moved."""
    for defaults in (DecodeConfig(beam_size=30), DecodeConfig(captions=25)):
        pairs = [("beam_size", str(defaults.num_beams)), ("captions", str(defaults.captions)), ("sample", "false")]
        assert parse_decoding(pairs, defaults).num_beams == defaults.num_beams
        with pytest.raises(InputError, match=f"beam_size: expected at most {defaults.num_beams} of this server"):
            parse_decoding([("beam_size", str(defaults.num_beams + 1))], defaults)
