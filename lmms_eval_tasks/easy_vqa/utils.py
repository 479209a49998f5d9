"""lmms-eval's task `easy_vqa`: samples in LLaVA's format, as `ta_llava.data.easy_vqa` writes them."""

from pathlib import Path

from PIL import Image


IMAGES = Path("data/easy-vqa/images")


def easy_vqa_doc_to_visual(doc: dict) -> list[Image.Image]:
    with Image.open(IMAGES / doc["image"]) as image:
        return [image.convert("RGB")]


def easy_vqa_doc_to_text(doc: dict) -> str:
    return doc["conversations"][0]["value"].removeprefix("<image>\n")


def easy_vqa_doc_to_target(doc: dict) -> str:
    return doc["conversations"][1]["value"]
