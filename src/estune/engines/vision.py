"""What vision-language models are given of pictures, by the processors that come with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from estune.completion import Picture, Pictured, Prompt
from estune.errors import EstuneError, first_line

KEPT_BYTES = 256 << 20
"""How much of what was made of pictures is kept: a step's members are all shown the same."""
Inputs = dict[str, Tensor]
K = TypeVar("K")
V = TypeVar("V")


class Kept(Generic[K, V]):
    """What was made, by what it was made of, as long as all of it fits in `KEPT_BYTES`.

    Args:
        size: bytes of one.
    """

    def __init__(self, size: Callable[[V], int]) -> None:
        self._size = size
        self._all: dict[K, V] = {}

    @property
    def bytes(self) -> int:
        """How many all take together."""
        return sum(map(self._size, self._all.values()))

    def get(self, key: K, make: Callable[[], V]) -> V:
        """What is kept, or else what `make` gives."""
        if key not in self._all:
            made = make()
            if self.bytes + self._size(made) > KEPT_BYTES:
                self._all.clear()
            self._all[key] = made
        return self._all[key]


_images: Kept[Picture, Any] = Kept(lambda image: image.width * image.height * len(image.getbands()))


def images_of(pictures: Sequence[Picture]) -> list[Any]:
    """PIL images of pictures, upright and in RGB; those of the last ones are kept.

    Raises:
        EstuneError: one cannot be read to its end.
    """
    return [_images.get(picture, functools.partial(_image, picture)) for picture in pictures]


def _image(picture: Picture) -> Any:
    from PIL import Image, ImageOps

    try:  # upright, as transformers' own `load_image` has them
        return ImageOps.exif_transpose(Image.open(BytesIO(picture.data))).convert("RGB")
    except Exception as error:  # Pillow's readers raise what they come upon
        raise EstuneError(f"a picture cannot be read to its end ({first_line(error)}); save it again") from error


class Vision:
    """Makes inputs of a model's forward of prompts with pictures.

    Args:
        open_processor: gives the model's processor. It is called with the first picture: who shows none needs none.
    """

    def __init__(self, open_processor: Callable[[], Any]) -> None:
        self._open = open_processor
        self._processor: Any = None
        self._kept: Kept[tuple[str, tuple[Picture, ...]], Inputs] = Kept(_bytes)

    @property
    def kept_bytes(self) -> int:
        """How much is kept of what was made of pictures."""
        return self._kept.bytes

    def token_ids(self, text: str, pictures: Sequence[Picture], where: str) -> list[int]:
        """Token ids of a rendered prompt, with as many for each picture as the model sees it in.

        Raises:
            EstuneError: the processor cannot be had, or refuses the prompt.
        """
        ids: list[int] = self._kept_or_made(text, tuple(pictures), where)["input_ids"][0].tolist()
        return ids

    def kind(self, prompt: Sequence[int]) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """What must be alike in the prompts of one batch: the shapes of what their pictures give; of text, nothing."""
        if not isinstance(prompt, Pictured):
            return ()
        return tuple((key, tuple(value.shape)) for key, value in sorted(self._of(prompt).items()))

    def inputs(self, prompts: Sequence[Sequence[int]], width: int, like: Tensor) -> Inputs:
        """What the forward takes beside token ids, for prompts of one kind.

        Args:
            prompts: token ids.
            width: tokens of each row, prompt and completion; what tells tokens apart has zeros after the prompt.
            like: a tensor on the model's device, of its type.
        """
        each = [self._of(prompt) for prompt in prompts if isinstance(prompt, Pictured)]
        found: Inputs = {}
        for key in each[0] if each else ():
            value = torch.cat([of[key] for of in each]).to(like.device)
            if key.endswith("token_type_ids"):
                value = torch.nn.functional.pad(value, (0, width - value.shape[1]))
            found[key] = value.to(like.dtype) if value.is_floating_point() else value
        return found

    def _of(self, prompt: Pictured) -> Inputs:
        made = self._kept_or_made(prompt.text, prompt.pictures, "a prompt")
        return {name: value for name, value in made.items() if name not in ("input_ids", "attention_mask")}

    def _kept_or_made(self, text: str, pictures: tuple[Picture, ...], where: str) -> Inputs:
        return self._kept.get((text, pictures), lambda: self._processed(text, pictures, where))

    def _processed(self, text: str, pictures: Sequence[Picture], where: str) -> Inputs:
        if self._processor is None:
            self._processor = self._open()
        try:
            images = [_image(picture) for picture in pictures]
        except EstuneError as error:
            raise EstuneError(f"{where}: {error}") from error
        try:
            # A template brings the special tokens; the processor puts in as many for a picture as it has patches.
            made = self._processor(text=[text], images=[images], add_special_tokens=False, return_tensors="pt")
        except Exception as error:  # each model's processor raises what it likes
            raise EstuneError(
                f"{where}: the model's processor refuses it ({first_line(error)}); it takes one mark in the text for "
                "each picture"
            ) from error
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def _bytes(inputs: Inputs) -> int:
    return sum(value.nbytes for value in inputs.values())


def pictured(prompt: Prompt) -> list[Picture]:
    """The pictures of a conversation, in order."""
    contents = [message.get("content") for message in prompt if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return [part["image"] for part in parts if isinstance(part.get("image"), Picture)]
