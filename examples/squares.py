"""How many squares are in the picture? For a vision-language model: estune train --task examples/squares.py --model M.

The pictures are drawn here, and each is another. A row has its picture in the column `image`; it could as well be the
path of a file, its bytes, or parts of the prompt's messages. `python -m recipes.squares` makes a model of 0.2 million
parameters that begins to see, and recipes/squares.yaml trains it on this.
"""

import random

from PIL import Image, ImageDraw

SIDE = 32  # pixels
CELLS = 4  # a side: squares lie in cells, and so do not touch
QUESTION = "How many squares?"


def draw(count, generator):
    """A picture with `count` squares of any colour, each somewhere in a cell of its own."""
    image = Image.new("RGB", (SIDE, SIDE), tuple(generator.randrange(200, 256) for _ in "rgb"))
    pen = ImageDraw.Draw(image)
    width = SIDE // CELLS
    for cell in generator.sample(range(CELLS**2), count):
        size = generator.randint(3, 6)
        x = cell % CELLS * width + generator.randint(1, width - size - 1)
        y = cell // CELLS * width + generator.randint(1, width - size - 1)
        colour = tuple(generator.randrange(150) for _ in "rgb")
        pen.rectangle((x, y, x + size - 1, y + size - 1), fill=colour)
    return image


def rows(count, seed):
    """So many rows, with 1 to 9 squares each."""
    generator = random.Random(seed)
    found = []
    for _ in range(count):
        squares = generator.randint(1, 9)
        found.append({"prompt": QUESTION, "image": draw(squares, generator), "answer": str(squares)})
    return found


train = rows(2000, seed=0)
evaluation = rows(300, seed=1)


def right(completions, answer, **_):
    """1.0 where the completion is the number."""
    return [float(text.strip() == gold) for text, gold in zip(completions, answer, strict=True)]


def near(completions, answer, **_):
    """1.0 for the number, 0 for one that is three off or more, and for what is no number."""
    off = [abs(int(text) - int(gold)) if text.strip().isdecimal() else 3
           for text, gold in zip(completions, answer, strict=True)]  # fmt: skip
    return [max(0.0, 1 - distance / 3) for distance in off]


rewards = [right, near]
