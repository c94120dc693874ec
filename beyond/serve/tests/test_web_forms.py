import pytest
from helpers.web import BOUNDARY, form_part, make_form

from beyond.serve.web_forms import (
    LIMITS,
    MAX_PARTS,
    header_parameter,
    parse_decoding,
    parse_form,
    parse_multipart,
    parse_query,
)
from captioning.base.cli import InputError
from captioning.config.settings import DecodeConfig

# Forms.


def test_parse_multipart_returns_names_and_contents_as_they_are():
    content = bytes(range(256)) + b"\r\n--" + BOUNDARY[:-1].encode() + b"\r\n\r\n\r\n"
    body = make_form(form_part("image", content, '; filename="a.png"\r\nContent-Type: image/png'), form_part("b", b""))
    assert parse_multipart(BOUNDARY, body) == [("image", content), ("b", b"")]


@pytest.mark.parametrize(
    "headers",
    [
        "Content-Disposition: form-data; name=image",
        'content-disposition: form-data; filename="a;name=b.png"; name="image"',
        'Content-Disposition: form-data; name="image"; filename="caf\u00e9 \u72d7.png"',
        'Content-Disposition: form-data; name="image"; filename="two\r\n lines.png"',
        'Content-Disposition: form-data; name="image"; filename="quoted \\" name.png"',
        "Content-Type: image/png\r\nContent-Disposition: form-data; name=image",
        'Content-Disposition: form-data; name="image"; filename="a\r\nContent-Length: 3\r\n"',
    ],
)
def test_parse_multipart_finds_names_in_all_kinds_of_headers(headers):
    assert parse_multipart("b", make_form((headers, b"x"), boundary="b")) == [("image", b"x")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("multipart/form-data; boundary=b", "b"),
        ('multipart/form-data;charset=utf-8; BOUNDARY = "a b;c" ; x', "a b;c"),
        ('multipart/form-data; boundary="a\\"b"', 'a"b'),
        ('multipart/form-data; boundary="', ""),
        ("multipart/form-data; boundary*=utf-8''b", ""),
        ("multipart/form-data; a=boundary", ""),
        ('multipart/form-data; a="; boundary=b"', ""),
        ("multipart/form-data", ""),
    ],
)
def test_header_parameter(value, expected):
    assert header_parameter(value, "boundary") == expected


def test_parse_multipart_takes_a_preamble_an_epilogue_and_spaces_after_the_boundary():
    body = make_form(form_part("image", b"x"), boundary="b").replace(b"--b\r\n", b"--b \t\r\n")
    assert parse_multipart("b", b"preamble\r\n" + body + b"epilogue\r\n--b\r\n") == [("image", b"x")]


def test_parse_multipart_keeps_a_nested_form_as_content():
    inner = make_form(form_part("image", b"x"), boundary="inner")
    part = ('Content-Disposition: form-data; name="image"\r\nContent-Type: multipart/mixed; boundary=inner', inner)
    assert parse_multipart("b", make_form(part, boundary="b")) == [("image", inner)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "boundary of its Content-Type, found none"),
        (b"x--b\r\n", "boundary of its Content-Type, found none"),
        (b"--b\r\nContent-Disposition: form-data; name=image\r\n\r\nx\r\n", "none: it is cut off"),
        (b"--b\r\nContent-Disposition: form-data; name=image\r\nx\r\n--b--", "headers of at most 4096 bytes"),
        (b"--bc\r\nContent-Disposition: form-data; name=image\r\n\r\nx\r\n--b--", "headers of at most 4096 bytes"),
        (b"--b\r\n" + b"a" * 5000 + b": 1\r\n\r\nx\r\n--b--", "headers of at most 4096 bytes"),
        (b"--b\r\nContent-Type: image/png\r\n\r\nx\r\n--b--", "expected a name in each part"),
        (b"--b\r\nContent-Disposition: form-data; name*=utf-8''image\r\n\r\nx\r\n--b--", "expected a name"),
        (b"--b\r\n\r\nx\r\n--b--", "expected a name in each part"),
        (b"--b\r\n" * 10_000, f"more than {MAX_PARTS} parts"),
    ],
)
def test_parse_multipart_refuses_other_bodies(body, message):
    with pytest.raises(InputError, match=message):
        parse_multipart("b", body)


def test_parse_multipart_refuses_an_empty_boundary():
    with pytest.raises(InputError, match="boundary of its Content-Type"):
        parse_multipart("", make_form(form_part("image", b"x"), boundary=""))


def test_parse_form_separates_the_image_from_the_parameters():
    body = make_form(form_part("beam_size", b" 3\r\n"), form_part("image", b"x"), form_part("no_repeat", b"true"))
    assert parse_form(BOUNDARY, body) == (b"x", [("beam_size", "3"), ("no_repeat", "true")])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "one part with the name image in the form, found 0"),
        ([form_part("file", b"x")], "one part with the name image in the form, found 0"),
        ([form_part("image", b"x")] * 2, "one part with the name image in the form, found 2"),
        ([form_part("image", b"x"), form_part("photo", b"x" * 101)], "photo: expected at most 100 bytes"),
    ],
)
def test_parse_form_refuses_other_parts(parts, message):
    with pytest.raises(InputError, match=message):
        parse_form(BOUNDARY, b"\r\n--" + BOUNDARY.encode() + b"--" if not parts else make_form(*parts))


# Parameters.


def test_parse_query_returns_pairs():
    assert parse_query("") == []
    assert parse_query("beam_size=3&beam_size=%34&a=") == [("beam_size", "3"), ("beam_size", "4"), ("a", "")]


@pytest.mark.parametrize("query", ["beam_size", "&&", "a=1&b", "&".join(["beam_size=1"] * 50)])
def test_parse_query_refuses_other_text(query):
    with pytest.raises(InputError, match="expected parameters such as beam_size=5&captions=3"):
        parse_query(query)


def test_parse_decoding_begins_with_the_defaults():
    defaults = DecodeConfig(beam_size=5, max_words=20, length_penalty=0.5)
    assert parse_decoding([], defaults) == defaults
    pairs = [("beam_size", "3"), ("no_repeat", "True"), ("length_penalty", "2"), ("min_words", "0")]
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
        ([("temperature", "0.5")], "sample"),
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


@pytest.mark.parametrize("name", LIMITS)
def test_parse_decoding_takes_the_limits(name):
    assert getattr(parse_decoding([(name, str(LIMITS[name]))], DecodeConfig()), name) == LIMITS[name]


def test_parse_decoding_keeps_defaults_that_exceed_the_limits():
    assert parse_decoding([("captions", "2")], DecodeConfig(beam_size=50)).beam_size == 50
