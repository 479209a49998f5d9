"""Samples in LLaVA's format about the example images, and what the shipped models answer."""

from pathlib import Path

from conftest import ROOT


EXAMPLES = ROOT / "examples"
# The last expectation is wrong, so that not all is right.
SAMPLES = [
    ("teal_triangle.png", "what color is the shape?", "teal", "color"),
    ("red_circle.png", "what color is the shape?", " red ", "color"),
    ("teal_triangle.png", "what shape is in the image?", "triangle", None),
    ("red_circle.png", "describe the image.", "a red circle", "caption"),
    ("red_circle.png", "is there not a triangle in the image?", "no", "yes/no"),
]
ANSWERS = ["teal", "red", "triangle", "a red circle", "yes"]


def sample(image: str, question: str, expected: str, kind: str | None = None) -> dict:
    turns = [("human", f"<image>\n{question}"), ("gpt", expected)]
    return {
        "id": f"{Path(image).stem}: {question}",
        "image": image,
        "conversations": [{"from": role, "value": value} for role, value in turns],
        **({} if kind is None else {"type": kind}),
    }


TURNS = sample(*SAMPLES[0])["conversations"]
