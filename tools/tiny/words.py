"""Other words for the names in scenes.py. Each of them stands for one name only."""

SHAPE_WORDS = {
    "circle": ("disc", "disk", "dot", "round shape", "ball"),
    "square": ("box", "block", "square shape"),
    "triangle": ("triangle shape", "triangular shape", "upright triangle"),
    "star": ("five-pointed star", "star shape", "5-pointed star"),
    "cross": ("plus sign", "plus", "plus symbol", "cross shape"),
    "ring": ("hoop", "donut", "doughnut", "ring shape"),
}
COLOUR_WORDS = {
    "red": ("bright red", "crimson", "scarlet"),
    "orange": ("bright orange",),
    "yellow": ("bright yellow",),
    "green": ("bright green", "emerald green"),
    "blue": ("bright blue", "royal blue"),
    "purple": ("violet", "bright purple"),
    "white": ("pure white", "plain white"),
    "black": ("jet black", "pure black"),
}
SIZE_WORDS = {"small": ("little", "tiny", "small-sized"), "large": ("big", "huge", "large-sized")}
BACKGROUND_WORDS = {
    "gray": ("grey", "gray", "medium gray", "neutral grey"),
    "pink": ("light pink", "soft pink", "pale pink"),
    "sky blue": ("light blue", "pale blue", "sky-blue"),
    "beige": ("tan", "sand", "sandy beige"),
    "dark green": ("forest green", "deep green", "dark-green"),
    "navy": ("navy blue", "dark blue", "deep navy"),
}
TEXTURE_ADJECTIVES = {
    "plain": ("plain", "solid", "flat", "uniform"),
    "horizontal stripes": ("striped", "horizontally striped", "horizontal striped"),
    "vertical stripes": ("vertically striped", "vertical striped"),
    "checkered": ("checkered", "chequered", "checked", "checkerboard"),
    "gradient": ("gradient", "gradient", "shaded"),
}
TEXTURE_PHRASES = {
    "plain": ("without a pattern", "with no texture"),
    "horizontal stripes": ("with horizontal stripes", "with stripes"),
    "vertical stripes": ("with vertical stripes",),
    "checkered": ("with a checkered pattern", "with a checkerboard pattern", "with checks"),
    "gradient": ("with a gradient", "with a vertical gradient"),
}
