"""PixArt caption cleaning and token limits.

PixArt-alpha was trained on captions that went twice through DeepFloyd IF's web-text cleaning (PixArt-alpha
diffusion/model/t5.py); PixArt-Sigma on the raw text. The rules below are tables of (pattern, replacement), applied in
order; three of the steps between them (HTML, mojibake, entities) are left to BeautifulSoup, ftfy and html.
"""

import functools
import html
import logging
import re
import unicodedata
import warnings
from urllib.parse import unquote_plus

logger = logging.getLogger(__name__)

TOKEN_LIMITS = {"alpha": 120, "sigma": 300}

DOMAIN = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
FILE_TYPES = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b"
    "\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
ORNAMENTS = r"#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*"


def rules(*rows):
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rows)


ADDRESSES = rules(
    ("<person>", "person"),  # the name anonymiser of the training set, before it can pass for a tag
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{DOMAIN})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{DOMAIN})", ""),
)
MARKS = rules(
    (r"@\w+\b", ""),  # @nickname
    ("[\u31c0-\u9fff]+", ""),  # CJK strokes up to the unified ideographs
    (f"[{DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP address
    (r"\d:\d\d\s+$", ""),  # article time stamp
    (r"\\n", " "),  # a line feed that was written out
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.{FILE_TYPES}", ""),  # file name
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (f"[{ORNAMENTS}]+", " "),
    (r"\s+\.\s+", " "),
)
JOINERS = re.compile("[-_]")  # more than three of them: a-slug-instead-of-a-sentence
LEFTOVERS = rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{FILE_TYPES}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # 1920x1080, with a Latin or a Cyrillic x
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(text: str) -> str:
    """Cleaning of PixArt-alpha: the web-text rules, twice (the second pass sees what the first one unpacked)."""
    return clean_caption_once(clean_caption_once(text))


def clean_caption_once(text: str) -> str:
    """One pass of the rules. The order matters: each table expects what the one before it left."""
    markup_to_text, fix_text = libraries()
    text = apply(ADDRESSES, unquote_plus(text).strip().lower())
    text = apply(MARKS, markup_to_text(text))
    if len(JOINERS.findall(text)) > 3:
        text = JOINERS.sub(" ", text)
    text = html.unescape(html.unescape(fix_text(text)))
    return apply(LEFTOVERS, text).strip()


def no_cleaning(text: str) -> str:
    """What the original does with a caption that is not to be cleaned."""
    return text.lower().strip()


def apply(table, text):
    for pattern, replacement in table:
        text = pattern.sub(replacement, text)
    return text


@functools.cache
def libraries():
    """(markup -> text, mojibake -> text): BeautifulSoup and ftfy, or one warning and the standard library."""
    try:
        import bs4
        import ftfy
    except ImportError as missing:
        logger.warning(
            "Captions are cleaned with the standard library only, because %s is not installed. Plain prompts come out "
            "the same, HTML and wrongly decoded text may not: `pip install ftfy beautifulsoup4` for the full cleaning.",
            missing.name,
        )
        return tags_to_text, functools.partial(unicodedata.normalize, "NFC")

    def soup_to_text(text):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)
            try:
                return bs4.BeautifulSoup(text, features="html.parser").text
            except bs4.ParserRejectedMarkup:  # "<![": no parser makes sense of it, so it is a prompt and not a page
                return html.unescape(text)

    return soup_to_text, ftfy.fix_text


def tags_to_text(text):
    return html.unescape(re.sub(r"</?[a-z!][^>]*>", "", text))
