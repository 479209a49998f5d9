"""The demo: what it computes, and clicking through it in a browser."""

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLE_IMAGE, ROOT, make_lively, run_without_the_package
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from ta_llava.common.shipped_models import DEFAULT_LLAVA, DEFAULT_MODEL
from ta_llava.inference import answer, load


SPACE = ROOT / "hub_card" / "space"
QUESTION = "what shape is in the image?"
CHROMIUM = shutil.which("chromium")
CHROMIUM_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def front_matter() -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])


def test_the_space_installs_what_it_was_written_for():
    requirements = dict(re.findall(r"^([\w-]+)==(.+)$", (SPACE / "requirements.txt").read_text(), re.MULTILINE))
    constraints = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    settings = front_matter()
    assert requirements["gradio"] == settings["sdk_version"]
    assert requirements.keys() == {"gradio", "torch", "transformers"}  # what is not here would be taken from PyPI
    assert requirements.items() <= constraints.items()
    assert (SPACE / settings["app_file"]).is_file() and len(settings["short_description"]) <= 60  # the Hub's limit
    assert all((SPACE / "examples" / name).is_file() for name in ("red_circle.png", "teal_triangle.png"))


ASK = """
from pathlib import Path

{imports}

assert Path(DEFAULT_MODEL).is_relative_to(Path.cwd()) and Path(DEFAULT_LLAVA).is_relative_to(Path.cwd())
for model in (DEFAULT_MODEL, DEFAULT_LLAVA):
    print(*answer(*load(model), [(["examples/teal_triangle.png"], "what shape is in the image?")]))
"""


def test_the_folder_of_a_space_needs_no_package_but_the_public_ones(python_without_the_package, tmp_path):
    folder = tmp_path / "space"
    for _ in range(2):  # also where one is already
        subprocess.run(["make", "--silent", "space-folder", f"SPACE_FOLDER={folder}"], cwd=ROOT, check=True)
    files = {"README.md", "app.py", "examples", "requirements.txt", "ta_llava"}
    assert {path.name for path in folder.iterdir()} == files
    assert not any(path.is_symlink() for path in folder.rglob("*")) and (folder / "ta_llava" / "hub_card").is_dir()
    imports = re.findall(
        r"^from ta_llava\.[\w.]+ import (?:\(.+?\)|[^(]+?)$", (SPACE / "app.py").read_text(), re.M | re.S
    )
    assert len(imports) >= 5
    script = ASK.format(imports="\n".join([*imports, "from ta_llava.inference import answer"]))
    lines = run_without_the_package(python_without_the_package, folder, script, HF_HUB_OFFLINE="1")
    assert lines == ["triangle", "triangle"]


@pytest.fixture(scope="module")
def space():
    """The module `app.py`."""
    pytest.importorskip("gradio", reason="the demo needs gradio: make test-space")
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- what it computes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lively_llava(tmp_path_factory):
    """Folder of a stock LLaVA with random weights, whose answers depend on every setting."""
    folder = tmp_path_factory.mktemp("llava")
    config = LlavaConfig.from_pretrained(DEFAULT_LLAVA, tie_word_embeddings=False, dtype=torch.float32)
    config.text_config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = make_lively(LlavaForConditionalGeneration(config))
    model.generation_config.suppress_tokens = list(range(7))  # special ones: answers are as long as they may be
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(DEFAULT_LLAVA).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lively(space, lively_llava):
    return space.Models(DEFAULT_MODEL, lively_llava)


def complete(models, space, *settings):
    """The answer when it is complete, and how often it was shown before."""
    results = [
        (result.answer, result) for result in models.answer(space.load_rgb_image(EXAMPLE_IMAGE), QUESTION, *settings)
    ]
    return results[-1][0], results[-1][1], len({text for text, _ in results})


def test_the_answers_are_those_of_the_models(space, lively, lively_llava):
    items = [([EXAMPLE_IMAGE], QUESTION)]
    for settings, options in [((64, 0.0), (None, None)), ((16, 0.6), (16, 0.6)), ((16, 0.0), (16, None))]:
        (expected,) = answer(*load(lively_llava, *options), items)
        text, result, times_shown = complete(lively, space, *settings)
        assert text == expected and result.image_tokens == settings[0] and times_shown > 3
    assert complete(lively, space, None, 0.0)[0] == "triangle"
    counts = [lively.count_operations(budget, 0.0, 17, 64) for budget in (64, 36, 16)]
    assert counts == sorted(counts, reverse=True) and counts[-1] < counts[0] / 2
    assert counts[2] < lively.count_operations(16, 0.6, 17, 64) < counts[1]


def test_two_users_do_not_mix_their_settings(space, lively):
    settings = [(64, 0.0), (16, 0.6), (16, 0.0), (16, 0.9), (36, 0.9)]
    expected = [complete(lively, space, *values)[0] for values in settings]
    assert len(set(expected)) == len(settings)  # each setting has an answer of its own
    with ThreadPoolExecutor(len(settings)) as pool:
        together = list(pool.map(lambda values: complete(lively, space, *values)[0], settings * 3))
    assert together == expected * 3


def test_an_error_in_the_model_reaches_the_page(space, lively):
    import gradio

    with pytest.raises(gradio.Error, match="65 visual tokens"):
        list(space.ask(lively, str(EXAMPLE_IMAGE), QUESTION, 65, 0.6))
    with pytest.raises(gradio.Error, match="512"):
        list(space.ask(lively, str(EXAMPLE_IMAGE), "shape " * 600, 16, 0.6))
    assert complete(lively, space, 16, 0.6)[0]  # nobody has to wait for those who failed


def test_what_was_asked_is_text_in_the_page(space):
    panels = space.Panels([("<b>what</b>?", [("left to <i>", space.load_rgb_image(EXAMPLE_IMAGE))])], ("a", "b"))
    page = space.picture_html("Title", panels)
    assert "&lt;b&gt;what&lt;/b&gt;?" in page and "<b>" not in page and "<i>" not in page
    assert page.count("<figure>") == 1 and page.count("<img") == 2 and space.picture_html("Title", None) == ""


# --- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory) -> Path:
    """Where pictures of the page are left to be looked at: in the folder `SCREENSHOTS`, if there is such a variable."""
    return Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))


@pytest.fixture(scope="module")
def page(space, tmp_path_factory):
    """The page in Chromium, with what it has requested and what went wrong in it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser needs playwright: make test-space")
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    app = space.build_app(space.Models(DEFAULT_MODEL, DEFAULT_LLAVA))
    _, url, _ = space.launch(app, prevent_thread_lock=True, quiet=True)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("browser"),
            executable_path=CHROMIUM,
            args=CHROMIUM_ARGUMENTS,
            viewport={"width": 1280, "height": 900},
        )
        page = browser.pages[0]
        page.requested, page.problems = [], []
        page.on("request", lambda request: page.requested.append(request.url))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
        page.set_default_timeout(30_000)
        page.goto(url)
        page.get_by_role("button", name="Ask").wait_for()
        yield page
        browser.close()
    app.close()


def ask(page, question: str | None = None):
    if question is not None:
        page.get_by_role("textbox", name="Question").fill(question)
    page.get_by_role("button", name="Ask").click()


def wait_for(page, **answers):
    """Waits until these answers are there, and the pictures below them."""
    from playwright.sync_api import expect

    for name, text in answers.items():
        expect(
            page.get_by_label({"llava": "LLaVA", "vmtc": "VMTC + CMAI", "ta": "TA-LLaVA"}[name], exact=True)
        ).to_have_value(text, timeout=30_000)
    expect(page.get_by_text("ms for the answer")).to_have_count(3, timeout=30_000)


def test_ask_about_an_example_then_another_image_and_budget(page, screenshots):
    from playwright.sync_api import expect

    question = page.get_by_role("textbox", name="Question")
    page.screenshot(path=screenshots / "empty.png", full_page=True)
    assert not question.get_attribute("placeholder").endswith(
        "?"
    )  # nobody takes it for a question that is there already
    page.get_by_role("button", name=f"red circle: {QUESTION}").click()
    expect(page.get_by_role("textbox", name="Question")).to_have_value(QUESTION)
    ask(page)
    wait_for(page, llava="circle", vmtc="circle", ta="circle")
    pictures = page.locator(".panels img")
    expect(pictures).to_have_count(4 + 4 + 3, timeout=30_000)
    facts = page.get_by_text("tokens for the image")
    assert [text.split()[0] for text in facts.all_inner_texts()] == ["64", "16", "4"]
    first = pictures.nth(0).get_attribute("src")
    tops = [
        page.get_by_text(text, exact=True).last.bounding_box()["y"]
        for text in ("Examples", "LLaVA", "What VMTC keeps and merges")
    ]
    assert tops == sorted(tops)  # between an answer and its pictures there is nothing else
    assert pictures.nth(3).bounding_box()["y"] == pictures.nth(0).bounding_box()["y"]  # side by side
    page.screenshot(path=screenshots / "desktop.png", full_page=True)

    page.locator("input[type=file]").first.set_input_files(EXAMPLE_IMAGE)
    page.get_by_role("spinbutton", name=re.compile("VMTC")).fill("36")
    page.get_by_role("spinbutton", name=re.compile("CMAI")).fill("0")
    ask(page, "what color is the shape?")
    wait_for(page, llava="teal", vmtc="teal", ta="teal")
    expect(pictures).to_have_count(4 + 4, timeout=30_000)  # CMAI is off
    expect(facts.nth(1)).to_contain_text("36 tokens")
    assert pictures.nth(0).get_attribute("src") != first


def test_ask_on_a_phone(page, screenshots):
    """Nothing is wider than the screen; pictures stand below each other, each as wide as there is room."""
    from playwright.sync_api import expect

    page.set_viewport_size({"width": 390, "height": 844})
    page.reload()
    page.get_by_role("button", name="Ask").wait_for()
    page.locator("input[type=file]").first.set_input_files(EXAMPLE_IMAGE)
    expect(page.get_by_role("img").first).to_be_visible()
    ask(page, QUESTION)
    wait_for(page, llava="triangle", vmtc="triangle", ta="triangle")
    panels = page.locator(".panels img")
    expect(panels).to_have_count(4 + 4 + 3, timeout=30_000)
    page.screenshot(path=screenshots / "phone.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [panel.bounding_box() for panel in panels.all()]
    assert all(box["x"] > 0 and box["x"] + box["width"] < 390 and box["width"] > 280 for box in boxes)
    assert all(above["y"] + above["height"] < below["y"] for above, below in pairwise(boxes))
    page.set_viewport_size({"width": 1280, "height": 900})


def test_bad_input_is_a_message_in_the_page(page, screenshots, tmp_path):
    from playwright.sync_api import expect

    ask(page, "  ")
    expect(page.get_by_text("The question is empty.")).to_be_visible()
    notes = tmp_path / "Ann's notes.png"
    notes.write_text("no image at all")
    page.locator("input[type=file]").first.set_input_files(notes)
    ask(page, QUESTION)
    expect(page.get_by_text("Ann's notes.png is not an image that can be read")).to_be_visible()
    page.screenshot(path=screenshots / "message.png")
    expect(page.get_by_text("Error", exact=True)).to_have_count(0)  # the message is all: no marks on the answers
    # And it goes on.
    page.get_by_role("button", name="is there a red shape?").click()
    expect(page.get_by_role("textbox", name="Question")).to_have_value("is there a red shape?")
    ask(page)
    wait_for(page, llava="yes", vmtc="yes", ta="yes")


def test_no_other_host_is_asked_and_no_error_was_logged(page):
    assert page.requested and all(url.startswith(("http://127.0.0.1", "data:", "blob:")) for url in page.requested)
    assert page.problems == []
