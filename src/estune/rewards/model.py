"""A reward model: a transformers sequence classifier with one label, as a reward function (as in TRL 1.16)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from estune.completion import Rendering
from estune.errors import EstuneError


class RewardModel:
    """Scores prompt and completion together by the model's one logit.

    Plain text is concatenated; conversations are rendered by the reward model's own chat template, and so is text that
    `show` makes one of, as `Task.show` does. It is called in the trainer's thread, while members generate.

    Args:
        model: a directory, a hub id, or a loaded sequence-classification model.
        tokenizer: its tokenizer; the one that comes with the model if None.
        device: where to put the model, such as `cuda`; where it is if None (the CPU for one that is loaded here).
        batch_size: texts scored at once.

    Raises:
        EstuneError: for a model that cannot be loaded, has more than one label, or a tokenizer that cannot pad.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, device: str | None = None, batch_size: int = 16) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        source: str = model if isinstance(model, str) else model.config.name_or_path
        name = self.__name__ = source.rstrip("/").split("/")[-1] or type(model).__name__
        try:
            if isinstance(model, str):
                model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, trust_remote_code=False)
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception as error:  # the hub's, the network's and the loaders' own
            raise EstuneError(
                f"reward model {source or name} cannot be loaded: {' '.join(str(error).split())[:300]}; "
                "check the name, or give model and tokenizer"
            ) from error
        if model.config.num_labels != 1:
            raise EstuneError(
                f"reward model {name} has {model.config.num_labels} labels; give a sequence classifier with one"
            )
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                raise EstuneError(f"reward model {name}: its tokenizer has no token to pad with; set pad_token")
            tokenizer.pad_token = tokenizer.eos_token
        # The logit is taken at the last token that is not this one.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.show: Callable[[dict[str, Any], bool], Any] | None = None
        self.model = model.eval() if device is None else model.eval().to(device)
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    def __call__(
        self, *, prompts: Sequence[Any], completions: Sequence[Any], trainer_state: Any = None, **_: Any
    ) -> list[float | None]:
        """One logit per completion. Conversations are rendered with the date and the options of the run."""
        import torch

        rendering = getattr(trainer_state, "rendering", Rendering())
        texts = [
            self._text(prompt, completion, rendering) for prompt, completion in zip(prompts, completions, strict=True)
        ]
        scores: list[float | None] = []
        with torch.inference_mode():
            for start in range(0, len(texts), self.batch_size):
                inputs = self.tokenizer(
                    text=texts[start : start + self.batch_size],
                    return_tensors="pt",
                    padding=True,
                    padding_side="right",
                    add_special_tokens=False,
                ).to(self.model.device)
                scores += self.model(**inputs).logits[:, 0].float().tolist()
        return scores

    def _text(self, prompt: Any, completion: Any, rendering: Rendering) -> str:
        if isinstance(prompt, str):
            shown = prompt
            if self.show is not None:
                shown = self.show({"prompt": prompt}, self.tokenizer.chat_template is not None)
            if isinstance(shown, str):
                return shown + str(completion)
            prompt = shown
            completion = [{"role": "assistant", "content": completion}]
        from estune.render import RENDERER, Refused

        try:
            return RENDERER.render(self.tokenizer, [*prompt, *completion], rendering)
        except Refused as error:
            raise EstuneError(
                f"reward model {self.__name__}: its chat template refuses a conversation ({error})"
            ) from error
