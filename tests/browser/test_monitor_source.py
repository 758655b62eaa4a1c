"""What can be read off the monitor's JavaScript without a browser."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_text_has_a_translation_with_the_same_places():
    source = (ROOT / "web" / "js" / "texts.js").read_text(encoding="utf-8")
    languages = {}
    for language, body in re.findall(r"^ {2}(\w+): \{\n(.*?)^ {2}\},$", source, re.M | re.S):
        texts = re.findall(r'^ {4}(\w+): (".*"),$', body, re.M)
        languages[language] = {key: set(re.findall(r"\{(\w+)\}", text)) for key, text in texts}
    assert set(languages) == {"en", "zh"} and len(languages["en"]) > 50
    assert languages["en"] == languages["zh"]


def test_run_data_never_becomes_html():
    doors = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write"
    for path in (ROOT / "web" / "js").glob("*.js"):
        assert not re.search(doors, path.read_text(encoding="utf-8")), path.name
