"""Vision-language models: what they are shown, and that they are trained."""

from __future__ import annotations

import importlib.util
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from estune.completion import Picture, Pictured, Sampling
from estune.engines.loading import language_tensors
from estune.engines.transformers import TransformersEngine
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import trained_parameters
from tests.families import train_and_compare
from tests.models import build_model, save_model
from tests.visions import PLAIN, WITH_TORCHVISION, picture, png, save_vision

needs_torchvision = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torchvision", "num2words")),
    reason="these processors need torchvision and num2words",
)
FAMILIES = [*PLAIN, *(pytest.param(name, marks=needs_torchvision) for name in WITH_TORCHVISION)]


def ask(text: str, *pictures: Image.Image) -> Any:
    parts = [{"type": "image", "image": Picture(png(each))} for each in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_transformers_own(family: str, tmp_path: Path) -> None:
    engine = TransformersEngine(save_vision(tmp_path, family))
    shown = [picture(2), picture(5, 1), picture(3, 2)]
    prompts: list[Any] = [ask("How many?", each) for each in shown]
    prompts += ["text alone", [{"role": "user", "content": "a question"}], ask("Are these alike?", *shown[:2])]
    ids = engine.encode(prompts)
    found = engine.generate(ids, Sampling(8))
    scores = engine.score(ids, [each.token_ids for each in found])

    model = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=False)
    for i, pictures in ((0, shown[:1]), (1, shown[1:2]), (5, shown[:2])):
        text = ids[i].text  # type: ignore[attr-defined]
        given = processor(text=[text], images=[pictures], add_special_tokens=False, return_tensors="pt")
        assert given["input_ids"][0].tolist() == ids[i]
        whole = model.generate(**given, max_new_tokens=8, do_sample=False, eos_token_id=engine.end_ids, pad_token_id=1)
        assert whole[0, len(ids[i]) :].tolist() == found[i].token_ids
        assert engine.generate([ids[i]], Sampling(8)) == [found[i]]  # whatever is beside it

        # Probabilities of the next token, told without a cache by the model itself.
        logits = model(**given).logits[0, -1].float().log_softmax(-1)
        assert scores[i][0] == pytest.approx(float(logits[found[i].token_ids[0]].detach()), abs=1e-3)
    mark = ids[0][len(ids[0]) // 2]  # one of those that stand for the picture; the model may write it, too
    written = engine.score(ids[:1], [[*found[0].token_ids[:2], mark, 77]])[0]
    assert written[:2] == pytest.approx(scores[0][:2], abs=1e-3)
    other = engine.score(engine.encode([ask("How many?", picture(14, 9))]), [found[0].token_ids])
    assert other[0] != scores[0]  # the picture counts


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_trained_and_replayed(family: str, tmp_path: Path) -> None:
    model = save_vision(tmp_path / "model", family)
    rows = [{"prompt": "How many?", "image": picture(n, n)} for n in range(1, 7)]
    train_and_compare(tmp_path, model, rows)
    trained = set(Journal.read(tmp_path / "run").header.tensors)
    assert trained == {name for name in Checkpoint(model).tensors if not _sees(name)}
    assert trained == language_tensors(Checkpoint(model))


def _sees(name: str) -> bool:
    return any(part in name for part in ("vision", "visual", "connector", "multi_modal_projector"))


def test_its_eye_is_trained_by_a_pattern(tmp_path: Path) -> None:
    model = save_vision(tmp_path / "model", "llava")
    rows = [{"prompt": "How many?", "images": [picture(n, n)]} for n in range(1, 7)]
    train_and_compare(tmp_path, model, rows, train_parameters="*vision*, *projector*, !*class_embedding")
    trained = set(Journal.read(tmp_path / "run").header.tensors)
    assert trained == {n for n in Checkpoint(model).tensors if _sees(n) and not n.endswith("class_embedding")}


@needs_torchvision
def test_experts_that_the_checkpoint_has_turned(tmp_path: Path) -> None:
    model = save_vision(tmp_path / "model", "qwen3_vl_moe")
    file = model / "model.safetensors"
    turned = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in load_file(file).items()}
    save_file(turned, file, {"format": "pt"})  # as the hub has it
    rows = [{"prompt": "How many?", "image": picture(n, n)} for n in range(1, 7)]
    final = train_and_compare(tmp_path, model, rows)
    assert any(n.endswith("experts.down_proj") and t.shape[1:] == (16, 48) for n, t in final.tensors.items())


def test_prompts_with_pictures_go_to_other_processes(tmp_path: Path) -> None:
    engine = TransformersEngine(save_vision(tmp_path, "llava"))
    (ids,) = engine.encode([ask("How many?", picture(3))])
    assert isinstance(ids, Pictured)
    again = pickle.loads(pickle.dumps(ids))
    assert (list(again), again.text, again.pictures) == (list(ids), ids.text, ids.pictures)
    assert again.pictures[0].data == png(picture(3))
    assert np.array_equal(np.asarray(Image.open(BytesIO(again.pictures[0].data))), np.asarray(picture(3)))


def test_photographs_are_shown_upright(tmp_path: Path) -> None:
    """As transformers' pipelines and datasets show them."""
    engine = TransformersEngine(save_vision(tmp_path, "llava"))
    assert engine.vision is not None
    sideways, upright = BytesIO(), BytesIO()
    turned = Image.Exif()
    turned[0x112] = 6
    settings: dict[str, Any] = {"format": "TIFF"}  # which keeps every pixel
    picture(3).transpose(Image.Transpose.ROTATE_90).save(sideways, exif=turned, **settings)
    picture(3).save(upright, **settings)
    shown = [Pictured([1], "<image>", (Picture(file.getvalue()),), [1]) for file in (sideways, upright)]
    found = [engine.vision.inputs([prompt], 1, torch.zeros(1))["pixel_values"] for prompt in shown]
    assert torch.equal(found[0], found[1])


def test_what_is_kept_of_pictures_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(save_vision(tmp_path, "llava"))
    assert engine.vision is not None
    engine.encode([ask("How many?", picture(1))])
    one = engine.vision.kept_bytes
    monkeypatch.setattr("estune.engines.vision.KEPT_BYTES", one + one // 2)
    engine.encode([ask("How many?", picture(n)) for n in range(2, 6)])
    assert 0 < engine.vision.kept_bytes == one


def test_what_is_refused(tmp_path: Path) -> None:
    plain = TransformersEngine(save_model(tmp_path / "text", "qwen2"))
    with pytest.raises(EstuneError, match=r"prompt 0: it has a picture, and '.*text' is given text alone"):
        plain.encode([ask("How many?", picture(3))])
    folder = save_vision(tmp_path / "llava", "llava")
    engine = TransformersEngine(folder)
    twice = ask("How many?", picture(3))
    twice[0]["content"].append({"type": "image"})
    with pytest.raises(EstuneError, match="prompt 0: the model's processor refuses it"):
        engine.encode([twice])
    file = BytesIO()
    picture(3).save(file, "JPEG")
    parts = [{"type": "image", "image": Picture(file.getvalue()[:-300])}]  # Pillow opens it, and its end is lacking
    with pytest.raises(EstuneError, match="prompt 0: a picture cannot be read to its end"):
        engine.encode([[{"role": "user", "content": parts}]])
    (folder / "processor_config.json").unlink()
    with pytest.raises(EstuneError, match=r"its processor of pictures cannot be loaded .* processor\.save_pretrained"):
        TransformersEngine(folder).encode([ask("How many?", picture(3))])
    assert TransformersEngine(folder).encode(["text alone"])  # for which it needs none


def test_weights_of_the_language_model_are_all_by_default_of_others(tmp_path: Path) -> None:
    model = build_model("llama")
    assert len(trained_parameters(model, model.state_dict(), "auto")) == len(list(model.parameters()))
