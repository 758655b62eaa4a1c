"""Caption cleaning against the original's own results and, where diffusers is installed, against diffusers."""

import json
import os
import sys
from pathlib import Path

import pytest

from pixart_nodes.text import captions

GOLDEN_DIR = Path(os.environ.get("PIXART_GOLDEN_DIR", Path(__file__).parents[1] / "goldens"))
GOLDEN = json.loads((GOLDEN_DIR / "caption_cleaning.json").read_text(encoding="utf-8"))

# Every rule at least once, and what the rules may leave behind for each other.
AWKWARD = [
    "HTTPS://A.com/x?y See http:// and www:foo, mail me@site.org or @you.com today",
    "<!-- comment only -->",
    "<a href='x'>Link</a> &AMP; &#65;&#x1F600; &amp;lt;b&amp;gt; &copy &bogus;",
    "1_2_3_4_5 -- a—b–c―d «e» “f” ‘g’ `h` ´i¨",
    "#1 #12 #123 #1234 #12345 12345 123456 3:45 \n",
    "ﬁne ½ ½½ Ã©tÃ© â€œok â€ İSTANBUL K ß ~ § º",
    "jc66 jc66a 66vc2 a1b2c3 24x36 24х36 10.5×20. 2x",
    "Free  Shipping, worldwide shipping; free download free! click for more png images page  7",
    '"quoted" and \'quoted\' _end_ -end- :end: ;end;+',
    "a.b,c/d . e .. f ... g : h",
    "\x00\x1b\u200b\u2028 control",
    "+%2B%20%ff%zz",
    "㈱ ㌀ 㐀 ䷀ 一 カナ 한글 🎉",
]


@pytest.mark.parametrize("case", GOLDEN, ids=[f"{n:02}" for n in range(len(GOLDEN))])
def test_cleaning_equals_the_original(case):
    text = case["input"]
    cleaned = captions.clean_caption(text), captions.clean_caption_once(text), captions.no_cleaning(text)
    assert cleaned == (case["original"], case["original_single_pass"], case["no_cleaning"])


@pytest.mark.parametrize("text", AWKWARD)
def test_cleaning_equals_diffusers_on_awkward_text(text):
    pipeline = pytest.importorskip("diffusers").PixArtAlphaPipeline

    class Reference:
        bad_punct_regex = pipeline.bad_punct_regex

    once = pipeline._clean_caption(Reference(), text)
    assert captions.clean_caption_once(text) == once
    assert captions.clean_caption(text) == pipeline._clean_caption(Reference(), once)


@pytest.mark.parametrize("text", ["<![", "a <![x]> cat", "<", "&", "&#", "%", "\\n", "((((", "<p" * 50])
def test_cleaning_never_fails(text):
    assert isinstance(captions.clean_caption(text), str)


@pytest.mark.parametrize("module", ["ftfy", "bs4"])
def test_without_the_libraries_plain_prompts_are_cleaned_the_same_after_one_warning(module, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, module, None)
    captions.libraries.cache_clear()
    try:
        plain = [captions.clean_caption(text) for text in ("A Red_Fox (4k), <b>bold</b> &amp; FREE shipping", "a cat")]
    finally:
        captions.libraries.cache_clear()
    assert plain == ["a red_fox 4k , bold", "a cat"]
    assert [module in record.getMessage() for record in caplog.records] == [True]
