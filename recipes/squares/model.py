"""A tiny LLaVA that has only begun to see: CLIP's eye, a projector and a Llama, 0.2 million parameters together.

Its processor is a real one, its tokenizer one of bytes. On pictures of its own it is trained with gradients until it is
right about one time in three.
"""

import random
import runpy
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TASK = Path(__file__).parents[2] / "examples" / "squares.py"
SPECIAL = ("<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<image>")
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> Any:
    """Bytes and a few special tokens."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=list(SPECIAL[2:]),
    )
    found.chat_template = CHAT
    return found


def make_model(side: int, tokenizer: Any) -> tuple[Any, Any]:
    """The model, untrained, and its processor."""
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "hidden_size": 64}
    ids = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**layers, image_size=side, patch_size=8, projection_dim=64),
        text_config=transformers.LlamaConfig(
            **layers, **ids, num_key_value_heads=4, vocab_size=len(tokenizer), max_position_embeddings=128
        ),
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=-1,
    )
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = transformers.LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    return transformers.AutoModelForImageTextToText.from_config(config), processor


def warm_up(model: Any, processor: Any, task: Any, accuracy: float, most: int = 4000) -> dict[str, Any]:
    """Train it with gradients until it answers so many of a batch right, on average over the last ten batches."""
    generator = random.Random(2)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task["QUESTION"]}]}],
        add_generation_prompt=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    start = time.perf_counter()
    last: list[float] = []
    model.train()
    for step in range(most):
        counts = [generator.randint(1, 9) for _ in range(64)]
        images = [[task["draw"](count, generator)] for count in counts]
        given = processor(text=[text] * 64, images=images, add_special_tokens=False, return_tensors="pt")
        digits = torch.tensor([processor.tokenizer.convert_tokens_to_ids(str(count)) for count in counts])
        ends = torch.zeros_like(digits)
        length = given["input_ids"].shape[1]
        given["input_ids"] = torch.cat([given["input_ids"], digits[:, None]], 1)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        logits = model(**given).logits[:, length - 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.stack([digits, ends], 1).flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        last.append((logits[:, 0].argmax(-1) == digits).float().mean().item())
        if step > 50 and sum(last[-10:]) / 10 >= accuracy:
            break
    model.eval()
    return {"steps": step + 1, "seconds": round(time.perf_counter() - start, 1), "accuracy": sum(last[-10:]) / 10}


def make(folder: Path, accuracy: float) -> dict[str, Any]:
    """Write one to a folder, warmed up; return how that went."""
    task = runpy.run_path(str(TASK))
    model, processor = make_model(task["SIDE"], make_tokenizer())
    found = warm_up(model, processor, task, accuracy)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return {"warm start": found, "parameters": model.num_parameters()}
