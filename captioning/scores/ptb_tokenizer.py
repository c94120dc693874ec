r"""Splits English captions into the words that published scores are of, without Java.

    tokenize("A man can't swim (yet).")   # ["a", "man", "ca", "n't", "swim", "-lrb-", "yet", "-rrb-"]

Papers are scored with pycocoevalcap, the code of the COCO challenge. It calls a Java program for the words,
PTBTokenizer of Stanford CoreNLP 3.4.1 with -preserveLines -lowerCase, and drops its own list of punctuation. The rules
were fitted to its answers: none of 60,000 captions of Flickr8k and COCO is split otherwise, nor is any of 50,608 other
forms of them (without the spaces before their apostrophes, hyphens and full stops).

At each position every one of `RULES` is tried, and the longest match is the next token; of equally long ones, that of
the first rule. Where a pattern has a group the group is the token, and the rest of the match is only looked at.
Capitals go last, since some rules heed them: Wash. is a state, wash. the end of a sentence. Two habits of the program
look like errors, and are kept: brackets stay, as -lrb- and -rrb-, and the euro and the pound become $ and #.

Known to differ: the full stop of an initial or of "No." at the end of a caption, for which the program looks at the
caption after it; letters newer than Unicode 6; carriage returns, which are spaces here; addresses with wildcards; rare
HTML entities; the Turkish İ, whose small letter is a plain i here.

Other languages that are written with spaces are split by the same rules as there, which take apostrophes and full stops
for English ones. Chinese, Japanese and Thai have no spaces: their scores are of characters (`--words characters`).
"""

import re

# Characters and what they are made of.

_LETTER = (
    r"[^\W\d_\u00b2\u00b3\u00b9\u00bc-\u00be\u2070\u2074-\u2079\u2080-\u2089\u2150-\u2182\u2460-\u2793"
    r"\u3007\u3021-\u3029\u3038-\u303a\u3192-\u3195\u3220-\u32bf\U00010000-\U0010ffff]"
)
_ALNUM = rf"(?:{_LETTER}|\d)"
# Accents, vowel signs and the soft hyphen: they belong to a word, but not to what mixes letters and digits.
_MARK = (
    r"\u00ad\u02c2-\u02df\u02e5-\u02ef\u02ed-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"
    r"\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06e4\u0711\u0730-\u074a\u07a6-\u07b0\u07eb-\u07f3\u0900-\u0903\u093c"
    r"\u093e-\u094e\u0981-\u0983\u09bc-\u09cd\u0a01-\u0a4f\u0a81-\u0acf\u0b82-\u0bcd\u0c01-\u0c56\u0d3e-\u0d48"
    r"\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd"
)
_SYMBOL = (
    r"!-/:-@\[-`{-~\u0091-\u0094\u0096\u0097\u0080\u00a1-\u00a9\u00ab\u00ac\u00ae-\u00b4\u00b6-\u00b9\u00bb-\u00bf"
    r"\u00d7\u00f7\u037e\u0387\u0589\u05be\u05c0\u05c3\u05f3\u05f4\u060c\u061b\u061f\u066a\u066d\u06d4\u0964\u0965"
    r"\u2013-\u2023\u2026\u2030-\u203b\u203e-\u2042\u2044\u2070-\u208e\u20a0\u20a4\u20ac\u2100-\u214f\u2153-\u215e"
    r"\u2190-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6"
)
_WORD_LETTER = rf"(?:{_LETTER}|[{_MARK}]|&[aeiouAEIOU](?:acute|grave|uml);)"
_WORD = rf"{_WORD_LETTER}(?:{_WORD_LETTER}|\d)*(?:[.!?]{_WORD_LETTER}(?:{_WORD_LETTER}|\d)*)*"  # also e.g and a!b
_APOSTROPHE = r"(?:['\u0092\u2019]|&apos;)"
_APOSTROPHE_OR_QUOTE = r"(?:['`\u0091\u0092\u2018\u2019\u201b]|&apos;)"
_HYPHEN = r"[-_\u058a\u2010\u2011]"
_NUMBER = r"(?:\d*(?:[.:,\u00ad\u066b\u066c]\d+)+|\d+)"  # 5, 5:30, 1,000.50, .5
_END = r"(?=\s|\Z)"  # of a word that nothing follows

# Words that keep their full stop: in any case; only with a capital; not all in capitals; only before a number.

_ABBREVIATIONS = (
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|"  # months and days
    "ala|ariz|calif|colo|conn|ct|dak|fla|ga|ind|kan|kans|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wis|wisc|"
    "wyo|"  # states
    "adj|adm|adv|asst|assoc|atty|attys|brig|capt|cmdr|col|comdr|cpl|det|dr|drs|ens|esq|gen|gov|govs|hon|insp|jr|lieut|"
    "lt|maj|messrs|mlle|mme|mr|mrs|ms|msgr|pfc|pres|prof|profs|pvt|rep|reps|rev|sen|sens|sfc|sgt|spc|sr|st|ste|supt|"
    "supts|"  # titles
    "assn|ave|bancorp|bhd|bldg|blvd|bros|co|corp|cos|dept|ft|inc|intl|ltd|mt|natl|plc|rd|rt|sys|univ|"  # names
    "al|alex|cf|cie|elec|est|etc|ext|invt|jos|ph|seq|sq|tel|treas|vs|wm"
)
_CAPITALIZED_ABBREVIATIONS = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"  # states; in small letters they are words
_SMALL_ABBREVIATIONS = "mfg|mtg|ppte|pptes|ppty|pptys|pte|ptes|pty|ptys"  # the first letter may be a capital
_ABBREVIATIONS_OF_NUMBERS = "art|ca|fig|figs|no|nos|op|pp|prop"  # no. 5
# After an initial they begin a sentence: in "plan b. The" the word is b, in "b. Smith" it is "b.".
_SENTENCE_BEGINNINGS = (
    "a|about|according|additionally|after|an|as|at|but|earlier|he|her|here|however|if|in|it|last|many|more|now|once|"
    "one|other|our|she|since|so|some|such|that|the|their|then|there|these|they|this|we|what|when|while|yet|you"
)
_TWO_WORDS = {"can": "not", "gim": "me", "gon": "na", "got": "ta", "lem": "me", "wan": "na"}  # cannot, gimme, ...


# The rules. Of those with a group the group is the token; the rest of the match is looked at only.

_CONTRACTED = rf"{_APOSTROPHE}(?:[msd]|re|ve|ll)"
_NOT = rf"n{_APOSTROPHE_OR_QUOTE}t"
_HYPHENATED = rf"(?:[dDoOlL]{_APOSTROPHE}{_ALNUM})?{_ALNUM}+(?:{_HYPHEN}(?:[dDoOlL]{_APOSTROPHE}{_ALNUM})?{_ALNUM}+)*"
_POINTED = r"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9\u00ad]+))+"
_NAME = r"[A-Za-z][\w.:-]*"
_BEGINNING = rf"(?=[A-Z])(?i:{_SENTENCE_BEGINNINGS})"
_FILE_ENDINGS = (
    "bat|bmp|c|class|cgi|cpp|dll|doc|docx|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|"
    "txt|wav|x|xml|zip|wmv"
)
_PATTERNS = {
    # Web addresses and markup.
    "markup: <b>, </b>, <a href='x'>": (
        rf"<(?:[!?][A-Za-z-][^>]*|/?{_NAME}(?: +{_NAME}(?: *= *(?:\"[^\"]*\"|'[^']*'))?)* */?)[ ]*>"
    ),
    "address: https://a.com/b": r"(?i:https?)://[^\s\"<>|(){}]+[^\s\"<>|.!?(){},-]",
    "address: a.com/b, www.a.org": (
        r"(?:(?i:www)\.(?:[^\s`\"<>|.!?,]+\.)+[A-Za-z]{2,4}|(?:(?!\d)[^\s!-/:-@\[-`{-~]+\.)+(?i:com|net|org|edu))"
        r"(?:/[^\s\"<>|()]+[^\s\"'<>|.!?(){},-])?"
    ),
    "email: a@b.com": (r"(?:&lt;|<)?[A-Za-z0-9][^\s\"<>|(){}]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.]+(?:&gt;|>)?"),
    "name or hashtag: @anna, #snow": rf"@[A-Za-z_]\w*|#{_LETTER}+",
    "file: 1.jpg": rf"{_ALNUM}+(?:\.{_ALNUM}+)*\.(?i:{_FILE_ENDINGS})(?=[\s.!?,]|\Z)",
    # Contractions.
    "two words written as one: cannot, gonna": "|".join(f"((?i:{a}))(?i:{b})" for a, b in _TWO_WORDS.items()),
    "'t of 'tis and 'twas": r"('(?i:t))(?i:is|was)",
    "what stands before 's: man's": rf"({_WORD})(?i:{_CONTRACTED})",
    "what stands before n't: can't": rf"({_WORD_LETTER}(?:{_WORD_LETTER}|\d)*?)(?i:{_NOT})",
    "n't": rf"(?i:{_NOT})",
    "'s, 'm, 'd, 're, 've, 'll": rf"'(?i:[msd]|re|ve|ll)(?![A-Za-z])|(?!')(?i:{_CONTRACTED})",  # 'slide is a quote
    # Words.
    "word: dog, e.g": _WORD,
    "word with an apostrophe at its end: ol', d'": rf"(?i:dunkin|somethin|ol|[dlj]){_APOSTROPHE}",
    "word with an apostrophe before it: 'em, 'til, rock 'n' roll": (
        rf"{_APOSTROPHE}(?i:em|till?|cause|n{_APOSTROPHE})|'[nN]{_END}|[\u0092\u2019][nN]"
    ),
    "years: '90s, '98": rf"{_APOSTROPHE_OR_QUOTE}[2-9]0s|{_APOSTROPHE}\d\d{_END}",
    "word with an apostrophe: Hawai'i": rf"{_LETTER}+[aeiouyAEIOUY]{_APOSTROPHE}[aeiouA-Z]{_LETTER}*",
    "word with an apostrophe: M'Bala": rf"[A-HJ-XZn]{_APOSTROPHE}{_LETTER}{{2,}}",
    "word with an apostrophe: o'clock, c'mon, li'l": (
        rf"(?i:c{_APOSTROPHE}mon|c{_APOSTROPHE}est|o{_APOSTROPHE}o|cont'd\.?|nor'easter|e'er|s'mores|ev'ry|li'l|nat'l)"
    ),
    "y' of y'all": rf"([yY]{_APOSTROPHE}){_LETTER}",
    "word with hyphens: t-shirt, 3-year-old, jack-o'lantern": _HYPHENATED,
    "word with hyphens and points: 1.5-liter, u.s.-based": _POINTED,
    "word with slashes: his/her, F/A-18": (
        r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"
    ),
    "capitals with & or +: AT&T": r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+",
    "language: C++, F#": r"(?i:c\+\+|[cf]#)",
    # Words that keep their full stop.
    "abbreviation: Mr.": rf"(?i:ph\.d|ed\.d|{_ABBREVIATIONS})\.",
    "abbreviation with a capital: Wash.": rf"(?=[A-Z])(?i:{_CAPITALIZED_ABBREVIATIONS})\.",
    "abbreviation in small letters: pty.": rf"(?=[A-Za-z][a-z]+\.)(?i:{_SMALL_ABBREVIATIONS})\.",
    "abbreviation before a number: no. 5": rf"((?i:{_ABBREVIATIONS_OF_NUMBERS})\.)\s*\d",
    "letter before a sentence: plan b. The": rf"([A-Za-z])\.(?:\s+{_BEGINNING}{_END}|\s*\Z)",
    "initials: J., p.m.": r"[A-Za-z](?:\.[A-Za-z])*\.",
    "word before a full stop and a comma": rf"(?:{_WORD}|{_HYPHENATED}|{_POINTED})\.(?=[,;:])",
    # Numbers.
    "number: -5, 5:30, 1,000.50": rf"[-+]?{_NUMBER}",
    "fraction: 1/2, 1 1/2": r"(?:\d{1,4}[- \u00a0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}",
    "date: 12/25-2010": r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
    "telephone: (555) 123-4567": (
        r"(?:\(\d{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:\d{2,4}[- \u00a0])?\d{2,4}[- \u00a0])\d{3,4}[- \u00a0]?\d{3,5}"
    ),
    "currency: $, US$, #": r"[A-Z]*\$|#",
    # Signs.
    "face: :-)": r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]](?![A-Za-z0-9])",
    "face: ^_^": r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)",
    "dots: ...5, . . .": r"\.{3,}|\.(?: \.)+ \.",
    "run of a sign": r"[!?]+|-{2,}|\*+|#+|@@+|__+|<<|>>|''|``|[\u2018\u2019]{2}|(?:\\\*)+",
    "entity: &amp;": r"&(?i:lt|gt|quot|apos|amp|nbsp|[mn]dash|#\d+);",
    "sign": rf"[{_SYMBOL}]",
}
RULES = {name: re.compile(pattern) for name, pattern in _PATTERNS.items()}

# Most words need no rules: they are letters between spaces, and a full stop or comma after them is dropped.
_PLAIN_WORD = re.compile(r"([A-Za-z]+)(?:\s+|\Z)|([A-Za-z]{2,})[.,](?:\s+|\Z)|[.,](?:\s+|\Z)")
_KEEP_THEIR_STOP = (_ABBREVIATIONS, _CAPITALIZED_ABBREVIATIONS, _SMALL_ABBREVIATIONS, _ABBREVIATIONS_OF_NUMBERS)
_NOT_PLAIN = frozenset("|".join(_KEEP_THEIR_STOP).lower().split("|")) | {a + b for a, b in _TWO_WORDS.items()}

# Tokens that are written otherwise, and those that are dropped.

_WRITTEN = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"\u00a2": "cents", "\u00a3": "#", "\u0080": "$", "\u00a4": "$", "\u20a0": "$", "\u20ac": "$"},
    **{"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"},
    **{"&amp;": "&", "&lt;": "<", "&gt;": ">"},
}
for _form in ("'s", "'m", "'d", "'re", "'ve", "'ll", "n't"):
    for _other_apostrophe in ("\u0092", "\u2019", "&apos;"):
        _WRITTEN[_form.replace("'", _other_apostrophe)] = _form
_INSIDE = str.maketrans({"(": "-lrb-", ")": "-rrb-", " ": "\u00a0", "\u00ad": None})  # of longer tokens: :-), 1 1/2
_DROPPED = frozenset(
    [
        *".?!,:;-\u2026\u0096\u0097\u2013\u2014\u2015'`\"\u0091\u0092\u0093\u0094\u2018\u2019\u201b\u201c\u201d",
        *"\u00ab\u00bb\u2039\u203a",
        *("--", "---", "----", "''", "``", "\u2018\u2018", "\u2019\u2019"),
        *("&apos;", "&quot;", "&mdash;", "&ndash;", "&nbsp;"),
    ]
)


def tokenize(caption: str) -> list[str]:
    """Splits an English caption into words: those of pycocoevalcap's PTBTokenizer, which published scores are of.

    They are in lower case and without punctuation. A few hold a no-break space, such as "1\u00a01/2".
    """
    tokens, position = [], 0
    while position < len(caption):
        plain = _PLAIN_WORD.match(caption, position)
        if plain and (word := (plain[1] or plain[2] or "").lower()) not in _NOT_PLAIN:
            if word:
                tokens.append(word)
            position = plain.end()
            continue
        token, position = _next_token(caption, position)
        if token:
            tokens.append(token)
    return tokens


def _next_token(text: str, position: int) -> tuple[str, int]:
    """Returns the token that begins at a position, "" for none or for one that is dropped, and where it ends."""
    matches = [match for rule in RULES.values() if (match := rule.match(text, position))]
    if not matches:
        return "", position + 1  # a space, or a character that no rule knows
    longest = max(matches, key=lambda match: match.end())  # the first of equally long ones
    group = longest.lastindex or 0
    return _normalize(longest[group]), longest.end(group)


def _normalize(token: str) -> str:
    """Writes a token as the Java program does; "" if it is punctuation."""
    if token in _DROPPED or not token.strip(". "):
        return ""
    if token[0] == "<" and token[-1] == ">":
        return token.lower().replace(" ", "\u00a0")
    token = token.lower().replace("i\u0307", "i")  # of İ, as in the model's words
    return _WRITTEN.get(token, token.translate(_INSIDE))
