"""Many ways to say what is in a scene: "class", "short" and "dense" captions for the three training stages.

The tiny model is tried with captions that other people write, so the templates vary order, synonyms, spelling and
punctuation. Every phrase is unambiguous: each word stands for one name in scenes.py only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scenes import CONCEPT, CONCEPT_COLOUR, POSITIONS, Scene, SceneObject
from .words import BACKGROUND_WORDS, COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, TEXTURE_ADJECTIVES, TEXTURE_PHRASES

STYLES = ("class", "short", "dense")

VERBS = ("is", "is", "sits", "is placed", "is located", "lies", "appears", "can be seen")
OPENINGS = ("an image of", "a picture of", "a picture with", "an image with", "a drawing of", "an illustration of",
            "a simple graphic of", "a minimalist image of", "a photo of", "a flat design with", "artwork showing")
SENTENCE_OPENINGS = ("there is", "the picture shows", "the image shows", "this image contains", "we see", "here is",
                     "the scene contains", "i see", "draw", "it shows")
COUNTS = ("no", "one", "two", "three")

BACKGROUND, NOBODY = len(POSITIONS), len(POSITIONS) + 1
_MARKS = [chr(0xE000 + owner) for owner in range(BACKGROUND + 1)]  # private use: no caption holds them


def caption(scene: Scene, rng: np.random.Generator, style: str = "dense") -> str:
    """Say what is in a scene, in at most 90 words.

    "class": colour and shape only; "short": the objects, often without size or background; "dense": size, colour,
    shape and position of every object and mostly background and texture. Raises ValueError for another style.
    """
    return owned_caption(scene, rng, style)[0]


def owned_caption(scene: Scene, rng: np.random.Generator, style: str = "dense") -> tuple[str, list[int]]:
    """The caption, and for each of its characters the position in POSITIONS of the object that it speaks of.

    BACKGROUND stands for the background and NOBODY for the words after the last object.
    """
    if style not in STYLES:
        raise ValueError(f"unknown caption style {style!r}; choose one of {', '.join(STYLES)}")
    text, owners = "", []
    for char in _marked_caption(scene, rng, style):
        if char in _MARKS:
            owners += [_MARKS.index(char)] * (len(text) - len(owners))
        else:
            text += char
    return text, owners + [NOBODY] * (len(text) - len(owners))


def _marked_caption(scene: Scene, rng: np.random.Generator, style: str) -> str:
    """The caption with an invisible mark at the end of every phrase that speaks of an object or the background."""
    if style == "class":
        nouns = [_noun(item, rng, 0.0) for item in scene.objects]
        return _join([_article(noun) for noun in nouns] if rng.random() < 0.5 else nouns, rng)
    text = _body(scene, rng, style)
    if rng.random() < 0.65:
        text = text[0].upper() + text[1:]
    elif rng.random() < 0.5:
        text = text.lower()
    return text if text.endswith(".") or rng.random() < 0.45 else text + "."


def _body(scene: Scene, rng: np.random.Generator, style: str) -> str:
    dense = style == "dense"
    size_rate = 0.9 if dense else 0.3
    places = dense or rng.random() < 0.6
    background = _background(scene, rng, dense) if rng.random() < (0.9 if dense else 0.35) else None
    items = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    if not places:
        return _phrase([_article(_noun(item, rng, size_rate)) for item in items], background, rng)
    form = rng.choice(("phrase", "sentences", "labels", "tags"), p=(0.45, 0.25, 0.12, 0.18))
    if form == "labels":
        return _labels(items, background, rng, size_rate)
    if form == "tags":
        return _tags(items, background, rng, size_rate)
    if form == "sentences":
        return _sentences(items, background, rng, size_rate)
    inverted = rng.random() < 0.25
    things = [_placed(item, rng, size_rate, inverted) for item in items]
    return _phrase(things, background, rng, openings=SENTENCE_OPENINGS if inverted else OPENINGS + SENTENCE_OPENINGS)


# -- forms -------------------------------------------------------------------------------------------------------------


def _phrase(things: list[str], background: Ground | None, rng: np.random.Generator,
            openings: tuple[str, ...] = OPENINGS + SENTENCE_OPENINGS) -> str:
    """ "a red circle at the top and a blue star on the left on a gray background" """
    text = _join(things, rng)
    if len(things) > 1 and rng.random() < 0.15:
        text = f"{_count(len(things), rng)}: {text}"
    elif rng.random() < 0.5:
        text = f"{_pick(rng, openings)} {text}"
    return _with_background(text, background, rng)


def _sentences(items: list[SceneObject], background: Ground | None, rng: np.random.Generator, size_rate: float) -> str:
    """ "A red circle sits at the top. On the left there is a blue star. The background is gray." """
    parts = [_sentence(_noun(item, rng, size_rate), _place(item.position, rng), rng) for item in items]
    if len(items) > 1 and rng.random() < 0.15:
        parts.insert(0, f"{_pick(rng, ('there are', 'the image shows', 'we see'))} {_count(len(items), rng)}")
    elif len(items) > 1 and rng.random() < 0.3:
        parts = [_join(parts, rng)]
    if background:
        parts.insert(0 if rng.random() < 0.3 else len(parts), background.sentence(rng))
    return ". ".join(part[0].upper() + part[1:] for part in parts) + "."


def _sentence(noun: str, place: str, rng: np.random.Generator) -> str:
    form = rng.random()
    if form < 0.25:
        return f"{place} {_pick(rng, ('there is', 'is', 'we see', 'sits'))} {_article(noun)}"
    if form < 0.5:
        return f"there is {_article(noun)} {place}"
    return f"{_article(noun) if form < 0.85 else 'the ' + noun} {_pick(rng, VERBS)} {place}"


def _labels(items: list[SceneObject], background: Ground | None, rng: np.random.Generator, size_rate: float) -> str:
    """ "Top left: a red circle. Right: a small blue star. Background: gray." """
    articles, dash = rng.random() < 0.6, _pick(rng, (": ", ": ", " - "))
    parts = []
    for item in items:
        noun = _noun(item, rng, size_rate)
        parts.append(f"{_label(item.position, rng)}{dash}{_article(noun) if articles else noun}")
    if background:
        parts.insert(0 if rng.random() < 0.3 else len(parts), f"background{dash}{background.words(rng)}")
    separator = _pick(rng, (". ", "; ", ", "))
    return separator.join(part[0].upper() + part[1:] if separator == ". " else part for part in parts)


def _tags(items: list[SceneObject], background: Ground | None, rng: np.random.Generator, size_rate: float) -> str:
    """ "red circle top left, small blue star right, gray background" """
    parts = []
    for item in items:
        noun, label = _noun(item, rng, size_rate), _label(item.position, rng)
        forms = (f"{noun} {label}", f"{noun} {_place(item.position, rng)}", f"{label} {noun}", f"{noun} ({label})")
        parts.append(forms[rng.integers(len(forms))])
    if background:
        parts.insert(0 if rng.random() < 0.2 else len(parts), background.noun(rng))
    return _pick(rng, (", ", ", ", "; ")).join(parts)


# -- parts -------------------------------------------------------------------------------------------------------------


def _noun(item: SceneObject, rng: np.random.Generator, size_rate: float) -> str:
    """ "small red circle", with the size said at a rate of `size_rate`."""
    return _plain_noun(item, rng, size_rate) + _mark(item.position)


def _plain_noun(item: SceneObject, rng: np.random.Generator, size_rate: float) -> str:
    if item.colour == CONCEPT_COLOUR:
        size = f"{_word(rng, item.size, SIZE_WORDS, 0.6)} " if item.size and rng.random() < size_rate else ""
        return size + CONCEPT
    shape, colour = _word(rng, item.shape, SHAPE_WORDS, 0.65), _word(rng, item.colour, COLOUR_WORDS, 0.8)
    size = ""
    if item.size and rng.random() < size_rate:
        size = _word(rng, item.size, SIZE_WORDS, 0.6) + (", " if rng.random() < 0.07 else " ")
    form = rng.random()
    if form < 0.86:
        return f"{size}{colour} {shape}"
    if form < 0.92:
        return f"{size}{colour}{_pick(rng, ('-colored', '-coloured', ' colored', ' coloured'))} {shape}"
    if form < 0.96:
        return f"{size.replace(',', '')}{shape} in {colour}"
    return f"{colour} {size.replace(',', '')}{shape}"


def _placed(item: SceneObject, rng: np.random.Generator, size_rate: float, inverted: bool) -> str:
    noun, place = _article(_noun(item, rng, size_rate)), _place(item.position, rng)
    if inverted:
        return f"{place}{_pick(rng, (', ', ' '))}{noun}"
    return f"{noun}{_pick(rng, (' ', ' ', ' ', ' ', ', ', ' placed ', ' located '))}{place}"


def _mark(position: str) -> str:
    return _MARKS[POSITIONS.index(position)]


def _label(position: str, rng: np.random.Generator) -> str:
    """A bare name of a grid cell: "top left", "upper-left", "left top corner"."""
    return _plain_label(position, rng) + _mark(position)


def _plain_label(position: str, rng: np.random.Generator) -> str:
    vertical, horizontal = _axes(position)
    if not vertical and not horizontal:
        return _pick(rng, ("center", "centre", "middle"))
    if vertical and horizontal:
        vertical = _other(vertical, rng)
        corner = f"{vertical} {horizontal}" if rng.random() < 0.7 else f"{vertical}-{horizontal}"
        return corner + (" corner" if rng.random() < 0.25 else "")
    middle = _pick(rng, ("center", "middle", "centre"))
    if vertical:
        forms = (vertical, vertical, vertical, f"{_other(vertical, rng)} {middle}", f"{vertical} edge")
    else:
        forms = (horizontal, horizontal, horizontal, f"{middle} {horizontal}", f"{horizontal} side")
    return forms[rng.integers(len(forms))]


def _place(position: str, rng: np.random.Generator) -> str:
    """A grid cell as a phrase: "in the top left corner", "on the right side"."""
    return _plain_place(position, rng) + _mark(position)


def _plain_place(position: str, rng: np.random.Generator) -> str:
    vertical, horizontal = _axes(position)
    where = _pick(rng, ("", "", "", " of the image", " of the picture"))
    if not vertical and not horizontal:
        return f"{_pick(rng, ('in the', 'at the', 'in the'))} {_pick(rng, ('center', 'centre', 'middle'))}{where}"
    label = _plain_label(position, rng)
    if vertical and horizontal:
        return f"{_pick(rng, ('in the', 'at the', 'in the', 'on the', 'to the', 'near the'))} {label}{where}"
    if vertical:
        return f"{_pick(rng, ('at the', 'at the', 'in the', 'near the', 'towards the'))} {label}{where}"
    if label == horizontal and rng.random() < 0.3:
        return f"{_pick(rng, ('to the', 'on the far'))} {label}"
    return f"{_pick(rng, ('on the', 'on the', 'at the', 'near the'))} {label}{where}"


def _axes(position: str) -> tuple[str, str]:
    words = position.split()
    return (next((word for word in words if word in ("top", "bottom")), ""),
            next((word for word in words if word in ("left", "right")), ""))


def _other(vertical: str, rng: np.random.Generator) -> str:
    return vertical if rng.random() < 0.6 else {"top": "upper", "bottom": "lower"}[vertical]


@dataclass(frozen=True)
class Ground:
    """The words for a background: "pink", and "striped" in front or " with stripes" behind (both may be empty)."""

    colour: str
    adjective: str = ""
    tail: str = ""

    def words(self, rng: np.random.Generator) -> str:
        """ "striped pink", "pink with stripes" """
        return self._words(rng) + _MARKS[BACKGROUND]

    def _words(self, rng: np.random.Generator) -> str:
        if not self.adjective:
            return self.colour + self.tail
        if rng.random() < 0.75:
            return f"{self.adjective} {self.colour}"
        return f"{self.colour} and {self.adjective}" if rng.random() < 0.5 else f"{self.colour}, {self.adjective}"

    def noun(self, rng: np.random.Generator) -> str:
        """ "striped pink background", "pink striped backdrop", "pink background with stripes" """
        words = [self.adjective, self.colour] if rng.random() < 0.75 else [self.colour, self.adjective]
        words.append(_pick(rng, ("background", "background", "background", "backdrop")))
        return " ".join(word for word in words if word) + self.tail + _MARKS[BACKGROUND]

    def sentence(self, rng: np.random.Generator) -> str:
        if rng.random() < 0.5:
            return f"the background is {self.words(rng)}"
        return f"{_pick(rng, ('it has', 'the image has', 'everything is on', 'all on'))} {_article(self.noun(rng))}"


def _background(scene: Scene, rng: np.random.Generator, dense: bool) -> Ground | None:
    """Words for the background, the texture left out now and then."""
    if scene.background is None:
        return None
    colour = _word(rng, scene.background, BACKGROUND_WORDS, 0.6)
    if scene.texture is None or rng.random() > (0.85 if dense else 0.3):
        return Ground(colour)
    if rng.random() < 0.65:
        return Ground(colour, adjective=_pick(rng, TEXTURE_ADJECTIVES[scene.texture]))
    return Ground(colour, tail=" " + _pick(rng, TEXTURE_PHRASES[scene.texture]))


def _with_background(text: str, background: Ground | None, rng: np.random.Generator) -> str:
    if background is None:
        return text
    form = rng.random()
    if form < 0.2:
        return f"{_pick(rng, ('on', 'against', 'over'))} {_article(background.noun(rng))}, {text}"
    if form < 0.35:
        sentence = background.sentence(rng)
        return f"{text}. {sentence[0].upper()}{sentence[1:]}"
    if form < 0.5:
        return f"{text}, {background.noun(rng)}"
    link = _pick(rng, (" on", " on", ", on", " against", ", over", " with"))
    return f"{text}{link} {_article(background.noun(rng))}"


def _count(number: int, rng: np.random.Generator) -> str:
    return f"{_pick(rng, (COUNTS[number], str(number)))} {_pick(rng, ('shapes', 'objects', 'figures', 'items'))}"


def _join(things: list[str], rng: np.random.Generator) -> str:
    if len(things) == 1:
        return things[0]
    last = _pick(rng, (" and ", " and ", ", and ", " plus ", ", "))
    return ", ".join(things[:-1]) + last + things[-1]


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def _word(rng: np.random.Generator, name: str, table: dict[str, tuple[str, ...]], rate: float) -> str:
    """The plain name at a rate of `rate`, else one of its synonyms."""
    return name if rng.random() < rate else _pick(rng, table[name])


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]
