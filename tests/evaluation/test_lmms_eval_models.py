"""The models that lmms-eval gets. Without lmms-eval, a stand-in of the three things that the module takes from it."""

import importlib
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import pytest
import torch
import yaml
from conftest import EXAMPLE_IMAGE, FIXTURES, ROOT, SHIPPED_MODEL
from PIL import Image
from transformers import GenerationConfig

from ta_llava.common.shipped_models import DEFAULT_LLAVA
from ta_llava.data.easy_vqa import _llava_sample
from ta_llava.evaluation import evaluate
from ta_llava.evaluation.instruction_following import load_checkers
from ta_llava.inference import answer


MODULE = "ta_llava.evaluation.lmms_eval_models"
RED_CIRCLE = ROOT / "examples" / "red_circle.png"
TASKS = ROOT / "lmms_eval_tasks"


class Lmms:
    """`lmms_eval.api.model.lmms`."""

    def __init__(self):
        self.rank = 0
        self.task_dict = {}


def parse_args_string(text):
    """`lmms_eval.utils.simple_parse_args_string`, of integers and words."""
    pairs = (pair.split("=") for pair in text.split(",") if pair)
    return {name: int(value) if value.isnumeric() else value for name, value in pairs}


@dataclass
class Manifest:
    """`lmms_eval.models.registry_v2.ModelManifest`."""

    model_id: str
    simple_class_path: str


@pytest.fixture(scope="module")
def plugin():
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("lmms_eval") is None:
            stand_ins = {
                "lmms_eval.api.model": {"lmms": Lmms},
                "lmms_eval.utils": {"simple_parse_args_string": parse_args_string},
                "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
            }
            for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models", *stand_ins):
                module = ModuleType(name)
                module.__dict__.update(stand_ins.get(name, {}))
                patch.setitem(sys.modules, name, module)
        yield importlib.import_module(MODULE)
        sys.modules.pop(MODULE, None)


# --- questions -----------------------------------------------------------------------------------------------------

# Texts of different lengths, so that batches have padding; no, one and two images.
DOCUMENTS = [
    ("what color is the shape?", [EXAMPLE_IMAGE]),
    ("is there a circle?", [RED_CIRCLE]),
    ("is there not a triangle in the image?", [EXAMPLE_IMAGE]),
    ("what shape is in the image?", [RED_CIRCLE, EXAMPLE_IMAGE]),
    ("describe the image.", [RED_CIRCLE]),
    ("what shape is present?", []),
    ("what is the red shape?", [RED_CIRCLE]),
]
GREEDY = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


def images_of(document):
    """As a task gives them: open images, or nothing where there are none."""
    images = [Image.open(path) for path in document[1]]
    return images or None


def ask(model, second_arguments, documents=DOCUMENTS):
    """A request per document: its text, with `gen_kwargs` or an answer to rank."""
    model.task_dict = {"task": {"test": documents}}
    return [
        SimpleNamespace(args=(document[0], second, images_of, index, "task", "test"))
        for index, (document, second) in enumerate(zip(documents, second_arguments))
    ]


@pytest.fixture(scope="module")
def ta_llava_model(plugin):
    return plugin.TaLlavaLmms(str(SHIPPED_MODEL))


@pytest.fixture(scope="module")
def llava_model(plugin):
    return plugin.VmtcCmaiLlavaLmms(str(DEFAULT_LLAVA), visual_tokens=16, cmai=0.6)


@pytest.fixture(params=["ta_llava_model", "llava_model"])
def any_model(request, monkeypatch):
    model = request.getfixturevalue(request.param)
    monkeypatch.setattr(model, "batch_size", 1)
    return model


# --- generate_until ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answers_are_those_of_this_package_at_any_batch_size(any_model, batch_size):
    any_model.batch_size = batch_size
    expected = list(answer(any_model.model, any_model.processor, [(images, text) for text, images in DOCUMENTS]))
    assert list(any_model.generate_until(ask(any_model, [GREEDY] * len(DOCUMENTS)))) == expected
    assert expected[:2] == ["teal", "yes"]


def test_requests_with_the_same_settings_are_answered_together(ta_llava_model, monkeypatch):
    """In their own order all the same."""
    short = {**GREEDY, "max_new_tokens": 1}
    calls = []

    def generate(input_ids, max_new_tokens, **kwargs):
        calls.append((len(input_ids), max_new_tokens))
        return type(ta_llava_model.model).generate(
            ta_llava_model.model, input_ids, max_new_tokens=max_new_tokens, **kwargs
        )

    monkeypatch.setattr(ta_llava_model.model, "generate", generate)
    monkeypatch.setattr(ta_llava_model, "batch_size", 2)
    documents = [("describe the image.", [EXAMPLE_IMAGE]), ("describe the image.", [RED_CIRCLE])] * 3
    requests = ask(ta_llava_model, [GREEDY, short, short, GREEDY, GREEDY, GREEDY], documents)
    answers = list(ta_llava_model.generate_until(requests))
    assert answers == ["a teal triangle", "a", "a", "a red circle", "a teal triangle", "a red circle"]
    assert calls == [(2, 8), (2, 8), (2, 1)]


def test_until_ends_an_answer(ta_llava_model):
    documents = [("describe the image.", [RED_CIRCLE])] * 5
    until = [" circle", [" circle", " red"], [], None, ["\n\n", "blue", ""]]
    requests = ask(ta_llava_model, [{"max_new_tokens": 8, "until": stop} for stop in until], documents)
    assert list(ta_llava_model.generate_until(requests)) == ["a red", "a", *["a red circle"] * 3]


def test_what_was_answered_is_there_before_an_error(any_model):
    """lmms-eval's cache has then written it down."""
    documents = [DOCUMENTS[0], DOCUMENTS[1], ("what?", [FIXTURES])]
    answers = any_model.generate_until(ask(any_model, [GREEDY] * 3, documents))
    assert len(answers) == 3
    assert (answers[0], answers[1]) == ("teal", "yes")
    with pytest.raises(OSError):
        answers[2]


def test_an_answer_can_be_taken_by_its_place(ta_llava_model):
    answers = ta_llava_model.generate_until(ask(ta_llava_model, [GREEDY] * 2))
    assert (answers[-1], answers[0:1], list(answers)) == ("yes", ["teal"], ["teal", "yes"])
    with pytest.raises(IndexError):
        answers[2]


def test_no_requests(ta_llava_model):
    assert list(ta_llava_model.generate_until([])) == []
    assert list(ta_llava_model.loglikelihood([])) == []


@pytest.mark.parametrize(
    ("gen_kwargs", "expected"),
    [
        ({}, {"do_sample": False, "max_new_tokens": 1024, "num_beams": 1}),
        ({"temperature": 0, "top_p": 1.0}, {"do_sample": False, "max_new_tokens": 1024, "num_beams": 1}),
        (
            {"temperature": 0, "do_sample": True, "max_new_tokens": 5},
            {"do_sample": False, "max_new_tokens": 5, "num_beams": 1},
        ),
        ({"temperature": 0.7, "do_sample": False}, {"do_sample": False, "max_new_tokens": 1024, "num_beams": 1}),
        (
            {"temperature": 0.7, "top_p": None},
            {"do_sample": True, "temperature": 0.7, "max_new_tokens": 1024, "num_beams": 1},
        ),
        ({"do_sample": True, "top_k": 5}, {"do_sample": True, "top_k": 5, "max_new_tokens": 1024, "num_beams": 1}),
        ({"num_beams": 3, "image_aspect_ratio": "pad"}, {"do_sample": False, "max_new_tokens": 1024, "num_beams": 3}),
    ],
)
def test_generation_settings(plugin, gen_kwargs, expected):
    assert plugin.generation_settings({**gen_kwargs, "until": ["\n\n", "x"]}) == (expected, ["x"])


def test_beams_and_sampling_are_those_of_generate(any_model):
    requests = ask(any_model, [{"num_beams": 3, "max_new_tokens": 8}, {"temperature": 0.01, "max_new_tokens": 8}])
    assert list(any_model.generate_until(requests)) == ["teal", "yes"]


def test_only_the_task_says_how_answers_are_generated(any_model, monkeypatch):
    """What it leaves out is as in greedy decoding, not as the checkpoint's generation_config.json has it."""
    requests = ask(any_model, [GREEDY] * len(DOCUMENTS))
    expected = list(any_model.generate_until(requests))
    settings = {"num_return_sequences": 3, "num_beams": 4, "repetition_penalty": 50.0, "no_repeat_ngram_size": 1}
    stock, seen = any_model.model.generation_config, []
    monkeypatch.setattr(any_model.model, "generation_config", GenerationConfig(**{**stock.to_dict(), **settings}))
    assert list(any_model.generate_until(requests)) == expected
    generate = any_model.model.generate
    monkeypatch.setattr(any_model.model, "generate", lambda **kwargs: seen.append(kwargs) or generate(**kwargs))
    own = {"num_beams": 2, "repetition_penalty": 1.5, "length_penalty": 0.5, "temperature": 0.01}
    assert len(list(any_model.generate_until(ask(any_model, [own], DOCUMENTS[:1])))) == 1
    assert own.items() <= seen[0].items() and seen[0]["do_sample"]


def test_images_stand_where_the_text_says(plugin):
    image, content = {"type": "image"}, lambda text: {"type": "text", "text": text}
    assert plugin.user_content("what?", 0, "<image>") == [content("what?")]
    assert plugin.user_content("what?", 2, "<image>") == [image, image, content("what?")]
    assert plugin.user_content("<image>is <image>?", 2, "<image>") == [image, content("is "), image, content("?")]
    with pytest.raises(ValueError, match="has 1 <image>, but .* 2 images"):
        plugin.user_content("<image>?", 2, "<image>")


def test_the_place_of_an_image_in_the_text(any_model):
    documents = [
        ("<image>what color is the shape?", [EXAMPLE_IMAGE]),
        ("what color is the shape?<image>", [RED_CIRCLE]),
    ]
    answers = list(any_model.generate_until(ask(any_model, [GREEDY] * 2, documents)))
    assert answers[0] == "teal"
    if any_model.model.config.model_type == "ta_llava":  # which reads images apart from the text
        assert answers[1] == "red"


# --- loglikelihood -------------------------------------------------------------------------------------------------

ANSWERS = ["teal", "no", "yes", "circle", "a red circle", "triangle", "circle"]


def reference_score(model, text, images, given):
    """By the chat template's own marks of what the assistant says, one row at a time, from all logits."""
    content = [*({"type": "image", "image": Image.open(image)} for image in images), {"type": "text", "text": text}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": given}]},
    ]
    inputs = model.processor.apply_chat_template(
        [messages], tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    columns = inputs.pop("assistant_masks")[0].nonzero().squeeze(-1)[:-1]  # without the end of the turn
    with torch.no_grad():
        log_probs = model.model(**inputs).logits[0].log_softmax(dim=-1)[columns - 1]
    targets = inputs["input_ids"][0, columns]
    return log_probs.gather(-1, targets[:, None]).sum().item(), bool((log_probs.argmax(dim=-1) == targets).all())


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_are_those_of_the_rows_at_any_batch_size(any_model, batch_size):
    any_model.batch_size = batch_size
    requests = ask(any_model, [f" {given}" for given in ANSWERS])  # lmms-eval's delimiter does not count
    scores = list(any_model.loglikelihood(requests))
    expected = [reference_score(any_model, text, images, given) for (text, images), given in zip(DOCUMENTS, ANSWERS)]
    assert [likeliest for _, likeliest in scores] == [likeliest for _, likeliest in expected]
    torch.testing.assert_close(
        torch.tensor([score for score, _ in scores]),
        torch.tensor([score for score, _ in expected]),
        atol=1e-3,
        rtol=1e-4,
    )
    assert scores[0][1] and not scores[1][1]


def test_the_likeliest_answer_is_the_right_one(any_model):
    colors = ["red", "teal", "blue"]
    requests = ask(any_model, colors, [DOCUMENTS[0]] * 3)
    scores = list(any_model.loglikelihood(requests))
    assert max(range(3), key=lambda index: scores[index][0]) == 1
    assert sum(torch.tensor([score for score, _ in scores]).exp()) <= 1


def test_an_answer_from_the_document_and_text_alone(ta_llava_model):
    requests = ask(
        ta_llava_model, ["teal", lambda document: "teal" if document is DOCUMENTS[0] else "?"], DOCUMENTS[:1] * 2
    )
    first, second = ta_llava_model.loglikelihood(requests)
    assert first == pytest.approx(second)
    ((score, _),) = ta_llava_model.loglikelihood([SimpleNamespace(args=("", "teal"))])
    assert score < first[0]


def test_an_empty_answer_is_refused_before_any_work(ta_llava_model):
    with pytest.raises(ValueError, match="empty"):
        ta_llava_model.loglikelihood(ask(ta_llava_model, ["teal", " "]))


def test_a_template_that_changes_answers(ta_llava_model, monkeypatch):
    template = ta_llava_model.processor.chat_template.replace("render(message['content']) | trim", "'x'")
    monkeypatch.setattr(ta_llava_model.processor, "chat_template", template)
    with pytest.raises(ValueError, match="does not write 'teal'"):
        list(ta_llava_model.loglikelihood(ask(ta_llava_model, ["teal"])))


# --- loading -------------------------------------------------------------------------------------------------------


def test_the_flags_reach_the_model(llava_model):
    config = llava_model.model.config
    assert (config.use_vmtc, config.vmtc_num_visual_tokens, config.use_cmai, config.cmai_max_ratio) == (
        True,
        16,
        True,
        0.6,
    )


def test_model_args_come_before_the_command_line(plugin):
    """which always has a batch size of its own."""
    model = plugin.VmtcCmaiLlavaLmms.create_from_arg_string(
        f"pretrained={DEFAULT_LLAVA},batch_size=8,visual_tokens=16", {"batch_size": 1, "device": None}
    )
    assert (model.batch_size, model.model.config.vmtc_num_visual_tokens) == (8, 16)
    assert plugin.TaLlavaLmms.create_from_arg_string("", {"batch_size": "4", "device": "cpu"}).batch_size == 4


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("TaLlavaLmms", {"pretrained": str(DEFAULT_LLAVA)}, "is a 'llava' model, not 'ta_llava'"),
        ("VmtcCmaiLlavaLmms", {"pretrained": str(SHIPPED_MODEL)}, "is a 'ta_llava' model, not 'llava' or"),
        ("VmtcCmaiLlavaLmms", {"visual_tokens": 65}, "65"),
        ("TaLlavaLmms", {"pretrained": "no-such-folder/x"}, "No model could be loaded"),
        ("TaLlavaLmms", {"batch_size": "auto"}, "number from 1, got 'auto'"),
        ("TaLlavaLmms", {"batch_size": 0}, "number from 1, got 0"),
    ],
)
def test_models_that_cannot_be(plugin, name, arguments, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        getattr(plugin, name)(**arguments)


def test_without_lmms_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ImportError, match="pip install lmms-eval"):
        importlib.import_module(MODULE)


def test_the_registry_gets_both_models(plugin):
    named = {manifest.model_id: manifest.simple_class_path for manifest in plugin.manifests()}
    assert named == {"ta_llava": f"{MODULE}.TaLlavaLmms", "vmtc_cmai_llava": f"{MODULE}.VmtcCmaiLlavaLmms"}


def test_lmms_eval_finds_them(plugin):
    """By the entry point of the installed package."""
    pytest.importorskip("lmms_eval.api.instance")  # which the stand-in has not
    models = importlib.import_module("lmms_eval.models")
    assert models.get_model("ta_llava") is plugin.TaLlavaLmms
    assert models.get_model("vmtc_cmai_llava") is plugin.VmtcCmaiLlavaLmms


# --- the tasks -----------------------------------------------------------------------------------------------------


def load_task(name):
    """What the YAML file says, with the functions of `utils.py` that it names."""
    spec = importlib.util.spec_from_file_location(f"{name}_task", TASKS / name / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: getattr(utils, node.value.removeprefix("utils.")))
    return yaml.load((TASKS / name / f"{name}.yaml").read_text(), Loader)


QUESTIONS = ("what color is the shape?", "what shape is in the image?")


@pytest.fixture
def easy_vqa(tmp_path, monkeypatch):
    """The folder in which lmms-eval runs, with the samples as `ta_llava.data.easy_vqa` writes them: of two images."""
    images = tmp_path / "data/easy-vqa/images/test"
    images.mkdir(parents=True)
    samples = []
    for index, image in enumerate((EXAMPLE_IMAGE, RED_CIRCLE)):
        Image.open(image).save(images / f"{index}.png")
        samples += [_llava_sample(f"test/{index}.png", number, text, "?") for number, text in enumerate(QUESTIONS)]
    (tmp_path / "data/easy-vqa/test.json").write_text(json.dumps(samples))
    monkeypatch.chdir(tmp_path)


def test_the_task_of_easy_vqa(easy_vqa):
    task = load_task("easy_vqa")
    document, *_ = json.loads(Path(task["dataset_kwargs"]["data_files"]["test"]).read_text())
    assert task["doc_to_text"](document) == "what color is the shape?"
    assert task["doc_to_target"](document) == "?"
    (image,) = task["doc_to_visual"](document)
    with Image.open(EXAMPLE_IMAGE) as expected:
        assert (image.mode, image.size) == ("RGB", expected.size)


def test_the_task_of_if16(easy_vqa, tmp_path, monkeypatch):
    """It asks and checks as `ta-llava evaluate --task if16` does about the last question of each image."""
    task = load_task("if16")
    path = Path(task["dataset_kwargs"]["data_files"]["test"])
    documents = task["process_docs"](datasets.Dataset.from_list(json.loads(path.read_text())))
    kwargs = task["lmms_eval_specific_kwargs"]["default"]

    path.write_text(json.dumps(json.loads(path.read_text())[1::2]))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(evaluate, "load", lambda *arguments: (None, None))
    monkeypatch.setattr(evaluate, "answer", lambda model, processor, asked, **kwargs: (text for _, text in asked))
    scores = evaluate.evaluate(
        SHIPPED_MODEL, "if16", tmp_path / "out", data=path, image_folder=kwargs["image_folder"], progress=False
    )["scores"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [task["doc_to_text"](document, kwargs) for document in documents] == [line["question"] for line in lines]

    for document, line in zip(documents, lines):
        (image,) = task["doc_to_visual"](document, kwargs)
        with Image.open(line["image"]) as expected:
            assert image.tobytes() == expected.convert("RGB").tobytes()
    found = [task["process_results"](document, [line["answer"]]) for document, line in zip(documents, lines)]
    metrics = {metric["metric"]: metric["aggregation"] for metric in task["metric_list"]}
    assert list(metrics) == list(scores)
    for name, aggregation in metrics.items():
        values = [result[name] for result in found if name in result]
        assert len(values) == scores[name]["questions"]
        rate = sum(values) / len(values) if aggregation == "mean" else aggregation(values)
        assert rate == pytest.approx(scores[name]["success_rate"])
    assert 0 < scores["average"]["success_rate"] < 1


def test_the_task_of_if16_needs_its_checkers(monkeypatch):
    monkeypatch.setitem(sys.modules, "punkt", None)
    load_checkers.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'ta-llava\[evaluate\]'"):
        load_task("if16")
