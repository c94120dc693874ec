import random
import re

import pytest

from captioning.scores.java_scores import has_java
from captioning.scores.ptb_tokenizer import tokenize

# What pycocoevalcap's PTBTokenizer answered, each caption followed by one that begins with "A dog".
ANSWERS = [
    ("A man's dog can't swim.", "a man 's dog ca n't swim"),
    ("The dogs' bowls aren't full, it's John's.", "the dogs bowls are n't full it 's john 's"),
    (
        "I'd've said they'll come and we're here, I'm sure you've seen.",
        "i 'd 've said they 'll come and we 're here i 'm sure you 've seen",
    ),
    (
        "She cannot and he's gonna, lemme see, gimme that, we gotta and wanna go.",
        "she can not and he 's gon na lem me see gim me that we got ta and wan na go",
    ),
    (
        "'Tis the season, 'twas the night, get 'em, 'til dawn, 'cause of it.",
        "'t is the season 't was the night get 'em 'til dawn 'cause of it",
    ),
    ("rock 'n' roll at five o'clock with O'Neill and y'all", "rock 'n' roll at five o'clock with o'neill and y' all"),
    (
        "jack-o'-lantern and jack-o'lantern, hors d'oeuvres, s'mores, nor'easter",
        "jack-o lantern and jack-o'lantern hors d'oeuvres s'mores nor'easter",
    ),
    ("a Hawai'i surfer says 'ed' and \"quote\"", "a hawai'i surfer says ed and quote"),
    ("the '90s, the 1950's and the class of '98", "the '90s the 1950 's and the class of '98"),
    ("a t-shirt on a 3-year-old, a mother-in-law's x-ray", "a t-shirt on a 3-year-old a mother-in-law 's x-ray"),
    ("a man - a dog -- a cat--a bird --- done", "a man a dog a cat a bird done"),
    ("at 5:30 p.m. or 10:30am, 12/25/2010", "at 5:30 p.m. or 10:30 am 12/25/2010"),
    ("Mr. Smith of St. Louis, Wash. and the U.S. army", "mr. smith of st. louis wash. and the u.s. army"),
    ("Please wash. The pa. of ill. no. 5 and No. six", "please wash the pa of ill no. 5 and no six"),
    ("plan b. The cat and J. R. Smith", "plan b the cat and j. r. smith"),
    ("watching T. V.", "watching t. v"),
    ("a dog etc., i.e. a pet e.g.: one", "a dog etc. i.e. a pet e.g. one"),
    ("a jump... and . . . stop .... wow!!! really?! yes??", "a jump and stop wow !!! really ?! yes ??"),
    (
        "his/her head, AC/DC, F/A-18, 1/2 cup, 1 1/2 cups, 24/7",
        "his/her head ac/dc f/a -18 1/2 cup 1\u00a01/2 cups 24/7",
    ),
    (
        "#1 dog, 50% off, $5.50, US$ 5, 5 € and £5, 5¢, ½ and 1½",
        "# 1 dog 50 % off $ 5.50 us$ 5 5 $ and # 5 5 cents 1/2 and 1 1/2",
    ),
    ("Q&A at AT&T, R&B, b&w, a & b, &amp; &lt;b&gt;", "q&a at at&t r&b b & w a & b & < b >"),
    (
        "(a dog) [a cat] {a bird} :) :-( =D ^_^",
        "-lrb- a dog -rrb- -lsb- a cat -rsb- -lcb- a bird -rcb- :-rrb- :--lrb- =d ^_^",
    ),
    ("<b>bold</b> <unk> a<b 3 < 5 <3", "<b> bold </b> <unk> a < b 3 < 5 < 3"),
    ("see www.example.com, http://a.b/c?d=1&e=2 or foo.org", "see www.example.com http://a.b/c?d=1&e=2 or foo.org"),
    (
        "mail anna@example.com @anna #snow #b1 photo_1.jpg 1.jpg",
        "mail anna@example.com @anna #snow #b 1 photo_1 jpg 1.jpg",
    ),
    (
        "1,000 dogs, 1,000.50, -5, +5, .5, 1-800-555-1234, (555) 123-4567",
        "1,000 dogs 1,000.50 -5 +5 .5 1-800-555-1234 -lrb-555-rrb-\u00a0123-4567",
    ),
    ("C++ and C# w/ w/o a*b a_b a+b 100 ** ~ ^ | \\", "c++ and c# w / w/o a * b a_b a + b 100 ** ~ ^ | \\"),
    ("“It\u2019s smart,” she said — \u2018don\u2019t\u2019 … \u201990s", "it 's smart she said do n't \u201990s"),
    ("a 😀 smile ☀ ❤️ © ™ 5°C", "a smile ☀ ❤ © ™ 5 ° c"),
    ("собака бежит по траве, été naïve über Straße", "собака бежит по траве été naïve über straße"),
    ("l'homme d'un chien, aujourd'hui c'est", "l'homme d'un chien aujourd hui c'est"),
    ("一只狗 犬が走る สุนัข", "一只狗 犬が走る สุนัข"),
    ("a\u00a0b\ttab  two   spaces", "a b tab two spaces"),
    ("A DOG ISN'T A CAT'S FRIEND. I. Am", "a dog is n't a cat 's friend i. am"),
    (
        "foo.org/bar.html www.a-b.com, C++ ph.d. Dr. pty. Pty. PTY. Del. del.",
        "foo.org/bar.html www.a-b.com c++ ph.d. dr. pty. pty. pty del. del",
    ),
    (
        "ol' man, d' or Y'x, c'est o'clock, li'l C'MON, a 1.5-liter, U.S.-based, a.b-c, J.,",
        "ol' man d' or y' x c'est o'clock li'l c'mon a 1.5-liter u.s.-based a.b-c j.",
    ),
    ("dog., R.E.M., dog.; 3-d.:", "dog. r.e.m. dog. 3-d."),
    (
        "555-123-4567 or 555 123 4567, +1 555 123 4567",
        "555-123-4567 or 555\u00a0123\u00a04567 +1 555\u00a0123\u00a04567",
    ),
    ("12-25-2010 and 1/2/34, (^-^) --- ;) '' ``", "12-25-2010 and 1/2/34 -lrb-^-^-rrb- ;-rrb-"),
    ("a co\u00adoperative dog \u00ad 1\u00ad2", "a cooperative dog 12"),
    ("wait...2 dogs, a non-U.S. or non-U.S. x, 1-a. b, 1.5-a.,", "wait 2 dogs a non-u.s. or non-u.s. x 1-a b 1.5-a."),
    ("HE'LL go to M'Bala on 5/6-2010", "he 'll go to m'bala on 5/6-2010"),
    ("1st 2nd 10k 5x7 6'2\" 3D 4-wheeler a-1/2", "1st 2nd 10k 5x7 6 2 3d 4-wheeler a-1 / 2"),
    ("", ""),
    ("   ", ""),
    (".", ""),
]


@pytest.mark.parametrize(("caption", "words"), ANSWERS)
def test_tokenize_answers_as_the_java_program_did(caption, words):
    assert " ".join(tokenize(caption)) == words


def test_tokenize_takes_plain_words_as_the_rules_do(monkeypatch):
    """Most words are split off without the rules; that must change nothing."""
    rng = random.Random(0)
    words = ["dog", "Dog", "a", "I", "st", "St", "no", "cannot", "wash", "x", "5", "it's", "T-shirt"]
    parts = [*words, ".", ",", " ", "  "]
    captions = ["".join(rng.choice(parts) + rng.choice(("", " ", ". ", ", ")) for _ in range(6)) for _ in range(200)]
    fast = [tokenize(caption) for caption in captions]
    monkeypatch.setattr("captioning.scores.ptb_tokenizer._PLAIN_WORD", re.compile(r"(?!)"))
    assert fast == [tokenize(caption) for caption in captions]


@pytest.mark.slow
@pytest.mark.skipif(not has_java(), reason="compares with a Java program")
def test_tokenize_equals_the_java_program():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    rows = {number: [{"caption": caption}, {"caption": "A dog"}] for number, (caption, _) in enumerate(ANSWERS)}
    answers = PTBTokenizer().tokenize(rows)
    assert [answers[number] for number in rows] == [[" ".join(tokenize(caption)), "a dog"] for caption, _ in ANSWERS]


def test_the_turkish_capital_with_a_dot_is_a_plain_i():
    assert tokenize("\u0130ki KÖPEK") == ["iki", "köpek"]
