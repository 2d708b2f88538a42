"""Tiny random vision-language models with real processors, built where a test needs them."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw

from tests.models import SPECIAL, build_tokenizer

CHAT_TEMPLATE = (
    "{%% for m in messages %%}<|{{ m['role'] }}|>{%% for part in m['content'] %%}{%% if part['type'] == 'image' %%}%s"
    "{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}{%% if not loop.last or m['role'] != 'assistant' %%}"
    "<|end|>{%% endif %%}{%% endfor %%}{%% if add_generation_prompt %%}<|assistant|>{%% endif %%}"
)
SIDE = 56  # pixels
_Text = dict[str, Any]
_TEXT: _Text = {
    "vocab_size": 352,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EYE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": SIDE,
    "patch_size": 14,
}
_QWEN_EYE: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "intermediate_size": 48,
    "patch_size": 14,
    "hidden_size": 32,
}
_QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
PLAIN = ("llava", "idefics3", "gemma3")
"""Those whose processors need no more than Pillow."""
WITH_TORCHVISION = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm")


def build_vision(family: str, **text: Any) -> tuple[Any, Any]:
    """A tiny random vision-language model of a family, its language model's shape changed; and its processor."""
    torch.manual_seed(0)
    config, processor = globals()[f"_{family}"]({**_TEXT, **text})
    with torch.no_grad():
        model = transformers.AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # Gemma's projection, through which nothing would be seen
                parameter.normal_(std=0.2)
    return model.eval().requires_grad_(False), processor


def save_vision(folder: Path, family: str, **text: Any) -> Path:
    """Write one; return the directory."""
    model, processor = build_vision(family, **text)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(count: int, seed: int = 0, *, size: int = SIDE) -> Image.Image:
    """A white picture with `count` dark squares that do not touch."""
    draw = random.Random(seed)
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    for cell in draw.sample(range(16), count):
        x, y = (cell % 4) * size // 4, (cell // 4) * size // 4
        pen.rectangle(
            (x + 2, y + 2, x + size // 4 - 3, y + size // 4 - 3), fill=tuple(draw.randrange(120) for _ in "rgb")
        )
    return image


def png(image: Image.Image) -> bytes:
    """Its bytes as a file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _tokenizer(*tokens: str, mark: str, **named: str) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL[2:], *tokens]})
    for name, token in named.items():  # as attributes with ids, which processors ask for
        tokenizer._set_model_specific_special_tokens({name: token})
        setattr(tokenizer, name, token)
    tokenizer.chat_template = CHAT_TEMPLATE % mark
    return tokenizer


def _ids(tokenizer: Any, **tokens: str) -> dict[str, int]:
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def _llava(text: _Text) -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>", mark="<image>")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_EYE, projection_dim=16),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return config, transformers.LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=tokenizer.chat_template,
    )


def _idefics3(text: _Text) -> tuple[Any, Any]:
    return _idefics(transformers.Idefics3Config, "Idefics3", text, {})


def _smolvlm(text: _Text) -> tuple[Any, Any]:
    frames = {"video_processor": transformers.SmolVLMVideoProcessor()}
    return _idefics(transformers.SmolVLMConfig, "SmolVLM", text, frames)


def _idefics(kind: Any, name: str, text: _Text, more: dict[str, Any]) -> tuple[Any, Any]:
    tokens = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    tokenizer = _tokenizer(*tokens, mark="<image>")
    eye = getattr(transformers, f"{name}VisionConfig")(**_EYE)
    config = kind(
        vision_config=eye.to_dict(),
        text_config=transformers.LlamaConfig(**text).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=None,
    )
    pixels = getattr(transformers, f"{name}ImageProcessor")(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    return config, getattr(transformers, f"{name}Processor")(
        image_processor=pixels, tokenizer=tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template, **more
    )


def _gemma3(text: _Text) -> tuple[Any, Any]:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = _tokenizer(*named.values(), mark="<start_of_image>", **named)
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**_EYE).to_dict(),
        text_config=transformers.Gemma3TextConfig(**text, sliding_window=16).to_dict(),
        mm_tokens_per_image=4,
        **_ids(tokenizer, boi_token_index="<start_of_image>", eoi_token_index="<end_of_image>",
               image_token_index="<image_soft_token>"),
    )  # fmt: skip
    pixels = transformers.Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})
    return config, transformers.Gemma3Processor(
        image_processor=pixels, tokenizer=tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template
    )


def _qwen2_5_vl(text: _Text) -> tuple[Any, Any]:
    return _qwen("Qwen2_5_VL", "Qwen2VL", text, {"fullatt_block_indexes": [1]})


def _qwen3_vl(text: _Text) -> tuple[Any, Any]:
    eye = {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return _qwen("Qwen3VL", "Qwen3VL", text, eye)


def _qwen3_vl_moe(text: _Text) -> tuple[Any, Any]:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    eye = {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return _qwen("Qwen3VLMoe", "Qwen3VL", {**text, **experts}, eye)


def _qwen(name: str, processing: str, text: _Text, eye: dict[str, Any]) -> tuple[Any, Any]:
    tokenizer = _tokenizer(*_QWEN_TOKENS, mark=_QWEN_MARK)
    third = text["head_dim"] // 6
    sections = [text["head_dim"] // 2 - 2 * third, third, third]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    if name.startswith("Qwen3"):
        rope["mrope_interleaved"] = True
    text = {**text, "rope_parameters": rope}
    eye = {**_QWEN_EYE, "out_hidden_size": text["hidden_size"], **eye}
    ids = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), _QWEN_TOKENS,
                   strict=True))  # fmt: skip
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=eye, **_ids(tokenizer, **ids))
    limits = {"patch_size": 14, "merge_size": 2, "min_pixels": 28 * 28, "max_pixels": SIDE * SIDE}
    pixels = transformers.Qwen2VLImageProcessor(**limits)
    frames = getattr(transformers, f"{processing}VideoProcessor")(patch_size=14, merge_size=2)
    kind = transformers.Qwen2_5_VLProcessor if processing == "Qwen2VL" else transformers.Qwen3VLProcessor
    return config, kind(
        image_processor=pixels, tokenizer=tokenizer, video_processor=frames, chat_template=tokenizer.chat_template
    )
