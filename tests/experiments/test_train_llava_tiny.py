import pytest
import torch
import train_llava_tiny
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from ta_llava.data import easy_vqa as easy_vqa_data


def test_a_quick_trial_gives_a_llava_that_answers(tmp_path, monkeypatch):
    pytest.importorskip("easy_vqa")
    load = easy_vqa_data.load_easy_vqa
    for module in (easy_vqa_data, train_llava_tiny):
        monkeypatch.setattr(module, "load_easy_vqa", lambda split: load(split)[:12])
    train_llava_tiny.train_llava_tiny(tmp_path, scale=1e-6)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the shape?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=Image.new("RGB", (64, 64), "red"), return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 64
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    assert type(model) is LlavaForConditionalGeneration and not list((tmp_path / "model").glob("*.py"))
