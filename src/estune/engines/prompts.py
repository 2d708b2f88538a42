"""From prompts to token ids, with a model's tokenizer and limits; needs no weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from estune.completion import Completion, Message, Picture, Pictured, Prompt, Rendering, Sampling
from estune.engines.vision import Vision, pictured
from estune.errors import EstuneError, first_line
from estune.render import RENDERER, Refused


class PromptEncoder:
    """Encodes prompts for one model.

    Args:
        name: what the user calls the model.
        tokenizer: its tokenizer.
        config: its config, which says how many positions it has.
        most: the most positions that the engine is set up for, if fewer.
        rendering: what the tokenizer's chat template is told.
        vision: what a vision-language model makes of pictures; None for models that take text alone.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        config: Any,
        most: int | None = None,
        rendering: Rendering = Rendering(),  # noqa: B008
        vision: Vision | None = None,
    ) -> None:
        self.vision = vision
        self.name = name
        self.tokenizer = tokenizer
        self.config = config
        self.rendering = rendering
        reach = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.positions: int | None = min((n for n in (reach, most) if n and n > 0), default=None)
        self._set_up_for_fewer = self.positions is not None and self.positions != reach

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt.

        Text is encoded with the tokenizer's own special tokens; a conversation by the chat template, which brings
        them, and a conversation that ends with the assistant is left open for it to go on.

        Raises:
            EstuneError: a prompt is empty, or a conversation meets no chat template or one that refuses it.
        """
        found: list[list[int]] = [[] for _ in prompts]
        for kind, special in ((str, True), (list, False)):
            chosen = [i for i, prompt in enumerate(prompts) if isinstance(prompt, kind) and not pictured(prompt)]
            if not chosen:
                continue
            texts = [self.render(prompts[i], i) for i in chosen]
            for i, ids in zip(chosen, self.tokenizer(texts, add_special_tokens=special)["input_ids"], strict=True):
                found[i] = ids
        for i, prompt in enumerate(prompts):
            if pictures := pictured(prompt):
                found[i] = self._with_pictures(prompt, pictures, i)
        for i, ids in enumerate(found):
            if not ids:
                raise EstuneError(f"prompt {i}: {prompts[i]!r} encodes to no token; give it text")
        return found

    def _with_pictures(self, prompt: Prompt, pictures: Sequence[Picture], index: int) -> Pictured:
        if self.vision is None:
            raise EstuneError(
                f"prompt {index}: it has a picture, and {self.name!r} is given text alone; take a vision-language "
                "model, or leave the pictures out"
            )
        text = self.render(prompt, index)
        ids = self.vision.token_ids(text, pictures, f"prompt {index}")
        return Pictured(ids, text, pictures, self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def render(self, prompt: Prompt, index: int = 0, options: Mapping[str, Any] | None = None) -> str:
        """The text that the model is shown.

        Args:
            prompt: text, as it is, or a conversation, as the chat template has it.
            index: its number, for messages.
            options: further variables for the template, such as `tools`.

        Raises:
            EstuneError: as `encode`.
        """
        if isinstance(prompt, str):
            return prompt
        if not prompt:
            raise EstuneError(f"prompt {index}: a conversation without messages; give it at least one")
        if not self.has_template:
            raise EstuneError(
                f"prompt {index}: a conversation, but the tokenizer of {self.name!r} has no chat template; "
                "give plain text, or a model with a template"
            )
        known = ("text", "image") if self.vision is not None else ("text",)
        if other := next((kind for kind in _kinds(prompt) if kind not in known), None):
            raise EstuneError(
                f"prompt {index}: a message has a part of type {other!r:.40}, and {self.name!r} is given "
                f"{' and '.join(known)} alone; leave it out"
            )
        proceed = prompt[-1].get("role") == "assistant"
        rendering = replace(self.rendering, options={**self.rendering.options, **(options or {})})
        try:
            parts = self.vision is not None
            return RENDERER.render(self.tokenizer, prompt, rendering, begin=not proceed, proceed=proceed, parts=parts)
        except EstuneError:
            raise
        except (Refused, ValueError, TypeError, AttributeError, RecursionError) as error:
            why = first_line(error)
            raise EstuneError(
                f"prompt {index}: the chat template of {self.name!r} refuses it ({why}); messages need a role and a "
                "content that the template knows"
            ) from error

    def check(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Refuse what `generate` would refuse, before anything is begun.

        Raises:
            EstuneError: a prompt is empty, has an unknown token or leaves too few positions, or `sampling` is out of
                range.
        """
        if sampling.max_new_tokens < 1:
            raise EstuneError(f"max_new_tokens: {sampling.max_new_tokens} leaves nothing to generate; give at least 1")
        if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
            raise EstuneError(
                f"sampling: temperature {sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k}; "
                "needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0 (0: all tokens)"
            )
        text_config = self.config.get_text_config(decoder=True)
        for i, ids in enumerate(prompt_ids):
            if not ids:
                raise EstuneError(f"prompt {i}: no tokens; a prompt needs at least one")
            strange = next((token for token in ids if not 0 <= token < text_config.vocab_size), None)
            if strange is not None:
                raise EstuneError(
                    f"prompt {i}: token {strange} is none of the {text_config.vocab_size} of {self.name!r}; take the "
                    "tokenizer that the model was trained with"
                )
            if self.positions is not None and len(ids) + sampling.max_new_tokens > self.positions:
                wants = f"prompt {i}: {len(ids)} tokens and max_new_tokens {sampling.max_new_tokens} go beyond"
                if self._set_up_for_fewer:
                    raise EstuneError(
                        f"{wants} the {self.positions} tokens that vLLM was started for; set vllm_max_model_length to "
                        f"{len(ids) + sampling.max_new_tokens + 1} or more, or lower max_new_tokens"
                    )
                raise EstuneError(
                    f"{wants} the {self.positions} positions of {self.name!r}; shorten the prompt or lower "
                    "max_new_tokens"
                )


def _kinds(conversation: list[Message]) -> Iterator[Any]:
    """The types of the parts that messages have for their content."""
    for message in conversation:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            yield from (part.get("type", "text") for part in content if isinstance(part, dict))


def completions_of(tokenizer: Any, end_ids: Collection[int], token_ids: Sequence[list[int]]) -> list[Completion]:
    """A completion for each row of tokens, the last of which tells whether it was ended."""
    texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    return [Completion(text, ids, finished=ids[-1] in end_ids) for text, ids in zip(texts, token_ids, strict=True)]
