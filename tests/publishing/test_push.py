"""
Models are pushed over HTTP with the real client, to a hub on this machine, and loaded from there in an environment without
this package.
"""

import json
import shutil

import pytest
import torch
from conftest import EXAMPLE_IMAGE, SHIPPED_LLAVA, SHIPPED_MODEL, copy_without_a_weight, run_without_the_package
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from tiny_parts import save_language_model, save_tower
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from ta_llava.analysis.cost import Cost, count_cost
from ta_llava.building.assemble import assemble_ta_llava
from ta_llava.building.compress import compress_llava
from ta_llava.cli import app
from ta_llava.image_loading import load_rgb_image
from ta_llava.inference import load
from ta_llava.publishing import existing_card, model_card
from ta_llava.publishing import push as publish


QUESTION = "what shape is in the image?"
AUTO_CLASSES = {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"}

# Loads each of the given models and writes its logits; then runs the example of a card; then asks for what is not there.
LOAD = """
import importlib.util, json, sys
assert importlib.util.find_spec("ta_llava") is None, "the package must not be importable here"

import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

question, loads, example, wrong = json.loads(sys.argv[1])
report, logits = [], {}
for name, (repo, kwargs) in loads.items():
    kwargs["trust_remote_code"] = True
    config = AutoConfig.from_pretrained(repo, **kwargs)
    base, missing = AutoModel.from_pretrained(repo, output_loading_info=True, **kwargs)
    model, info = AutoModelForImageTextToText.from_pretrained(
        repo, output_loading_info=True, dtype=torch.float32, **kwargs
    )
    processor = AutoProcessor.from_pretrained(repo, **kwargs)
    content = [{"type": "image", "image": Image.open("image.png")}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits[name] = model.eval()(**inputs).logits[:, -1]
    report.append([type(each).__name__ for each in (config, base, model, processor)])
    report[-1] += [sorted(missing["missing_keys"]), sorted(info["missing_keys"]), type(model).__module__.split(".")[-2]]
torch.save(logits, "logits.pt")
print(json.dumps(report))

card = open(hf_hub_download(example, "README.md"), encoding="utf-8").read()
exec(card.split("```python")[1].split("```")[0])

for repo, revision in wrong:
    try:
        AutoModelForImageTextToText.from_pretrained(repo, revision=revision, trust_remote_code=True)
    except OSError as error:
        print(json.dumps(" ".join(str(error).split())))
"""


@pytest.fixture(scope="module", autouse=True)
def count_each_config_once():
    """It takes seconds, and the models here are few."""
    counts: dict[str, Cost] = {}

    def count(config, *arguments, **kwargs):
        key = config.to_json_string()
        if key not in counts:
            counts[key] = count_cost(config, *arguments, **kwargs)
        return counts[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_card, "count_cost", count)
        yield


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """This process, and nobody else, is logged in there."""
    home = tmp_path_factory.mktemp("home")
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        server.connect(patch, home, server.token)
        yield server


def push(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["push", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def last_logits(model, processor) -> torch.Tensor:
    content = [{"type": "image", "image": load_rgb_image(str(EXAMPLE_IMAGE))}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed") / "model"
    compress_llava(SHIPPED_LLAVA, folder, 16, 0.6)
    return folder


def test_what_was_pushed_loads_without_the_package(hub, compressed, python_without_the_package, tmp_path):
    # A TA-LLaVA by the command, twice, with other weights the second time.
    model, processor = load(SHIPPED_MODEL)
    expected = {"pinned": last_logits(model, processor)}
    code, out, error = push(SHIPPED_MODEL, "my-model")  # without the user's name
    assert code == 0, error
    first = hub.history("alice/my-model")[1].oid
    assert f"{hub.url}/alice/my-model/commit/{first}\n" in out and f"The revision to pin is {first}." in out
    with torch.no_grad():
        model.lm_head.weight.add_(0.01 * torch.randn_like(model.lm_head.weight))
    model.half().save_pretrained(tmp_path / "changed")
    processor.save_pretrained(tmp_path / "changed")
    expected["latest"] = last_logits(*load(tmp_path / "changed"))
    assert push(tmp_path / "changed", "alice/my-model", "--revision", "main")[0] == 0
    second = hub.history("alice/my-model")[1].oid
    assert first != second

    # What is there: config, code and processor complete, and a card that names the commit before its own.
    files = hub.files("alice/my-model")
    assert set(json.loads(files["config.json"])["auto_map"]) >= AUTO_CLASSES
    assert {"chat_template.jinja", "generation_config.json", "tokenizer.json", "modeling_ta_llava.py"} <= files.keys()
    card = files["README.md"].decode()
    assert f'repo, revision = "alice/my-model", "{second}"\n' in card and "\n# my-model\n" in card
    assert hub.history("alice/my-model")[0].message == "Upload model card"

    # A LLaVA by the library's own methods.
    llava = AutoModelForImageTextToText.from_pretrained(compressed, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(compressed)
    expected["llava"] = last_logits(llava, processor)
    llava.push_to_hub("alice/llava")
    processor.push_to_hub("alice/llava")
    assert set(json.loads(hub.files("alice/llava")["config.json"])["auto_map"]) >= AUTO_CLASSES
    assert ModelCard(hub.files("alice/llava")["README.md"].decode()).data.tags == ["vmtc", "cmai", "llava"]
    # And that by the command, to a branch.
    assert push(compressed, "alice/my-model", "--revision", "llava")[0] == 0
    expected["branch"] = expected["llava"]

    repo = "alice/my-model"
    loads = {
        "latest": (repo, {}),
        "pinned": (repo, {"revision": first, "code_revision": first}),
        "llava": ("alice/llava", {}),
        "branch": (repo, {"revision": "llava"}),
    }
    hub.add("alice/gated", {"config.json": "{}"}, gated=True)
    wrong = [(repo, "no-such-branch"), ("alice/no-such-repo", "main"), ("alice/gated", "main")]
    shutil.copy(EXAMPLE_IMAGE, tmp_path / "image.png")
    arguments = json.dumps([QUESTION, loads, repo, wrong])
    environment = hub.environment(tmp_path / "elsewhere")
    report, answer, *messages = run_without_the_package(
        python_without_the_package, tmp_path, LOAD, arguments, **environment
    )
    ta_llava = ["TaLlavaConfig", "TaLlavaModel", "TaLlavaForConditionalGeneration", "TaLlavaProcessor", [], []]
    vmtc_cmai = [f"VmtcCmaiLlava{name}" for name in ("Config", "Model", "ForConditionalGeneration", "Processor")] + [
        [],
        [],
    ]
    branch = hub.repos["model", repo].branches["llava"]
    llava_commit = hub.history("alice/llava")[0].oid
    assert json.loads(report) == [  # the last item is the commit of the code
        [*ta_llava, hub.history(repo)[0].oid],
        [*ta_llava, first],
        [*vmtc_cmai, llava_commit],
        [*vmtc_cmai, branch],
    ]
    logits = torch.load(tmp_path / "logits.pt")
    for name in loads:
        torch.testing.assert_close(logits[name], expected[name], msg=lambda message, name=name: f"{name}: {message}")
    assert not torch.allclose(logits["latest"], logits["pinned"], atol=1e-3)
    assert answer == "triangle"  # of the example
    unknown, missing, gated = messages
    assert "no-such-branch is not a valid git identifier" in unknown
    assert "alice/no-such-repo is not a local folder" in missing
    assert "gated" in gated


def test_a_model_made_of_repos_names_them(hub, tmp_path):
    hub.add("alice/llava", {path.name: path.read_bytes() for path in SHIPPED_LLAVA.iterdir()})
    compress_llava("alice/llava", tmp_path / "compressed", 16)
    save_tower(tmp_path / "tower")
    save_language_model(tmp_path / "language-model")
    for part in ("tower", "language-model"):
        hub.add(f"alice/{part}", {path.name: path.read_bytes() for path in (tmp_path / part).iterdir()})
    assemble_ta_llava(tmp_path / "assembled", "alice/tower", "alice/language-model")
    bases = {"compressed": ["alice/llava"], "assembled": ["alice/tower", "alice/language-model"]}
    for name, expected in bases.items():
        assert ModelCard(model_card.write_model_card(tmp_path / name, name)).data.base_model == expected


def test_a_second_push_of_the_same_changes_nothing(hub, compressed):
    assert push(compressed, "alice/twice")[0] == 0
    history = hub.history("alice/twice")
    code, out, _ = push(compressed, "alice/twice")
    assert code == 0 and hub.history("alice/twice") == history
    assert f"The revision to pin is {history[1].oid}." in out


def test_a_card_that_names_other_weights_is_not_believed(hub, compressed):
    assert push(compressed, "alice/other")[0] == 0
    config = json.loads(hub.files("alice/other")["config.json"])
    hub.add("alice/other", {"notes.txt": "of another model", "config.json": json.dumps({**config, "x": 1})})
    hub.add("alice/other", {"config.json": hub.files("alice/other", hub.history("alice/other")[1].oid)["config.json"]})
    head = hub.history("alice/other")[0].oid
    code, out, _ = push(compressed, "alice/other")
    assert code == 0 and f"The revision to pin is {head}." in out


def test_a_card_that_somebody_wrote_is_kept(hub, compressed):
    hub.add("alice/kept", {"README.md": "---\nlicense: mit\n---\nmine"})
    code, _, error = push(compressed, "alice/kept")
    assert code == 0 and "README.md of the repo was kept" in error and "--overwrite-card" in error
    assert hub.files("alice/kept")["README.md"] == b"---\nlicense: mit\n---\nmine"
    code, _, error = push(compressed, "alice/kept", "--overwrite-card")
    assert code == 0 and "kept" not in error
    assert f'"alice/kept", "{hub.history("alice/kept")[1].oid}"' in hub.files("alice/kept")["README.md"].decode()


def test_the_blank_card_of_the_library_is_no_card(hub, compressed):
    AutoModelForImageTextToText.from_pretrained(compressed).push_to_hub("alice/blank")
    blank = hub.files("alice/blank")["README.md"].decode()
    assert "[More Information Needed]" in blank
    code, _, error = push(compressed, "alice/blank")
    assert code == 0 and "kept" not in error
    assert existing_card.is_unedited(hub.files("alice/blank")["README.md"].decode())

    filled_in = blank.replace("[More Information Needed]", "mine", 1)
    hub.add("alice/blank", {"README.md": filled_in})
    assert "README.md of the repo was kept" in push(compressed, "alice/blank")[2]
    assert hub.files("alice/blank")["README.md"].decode() == filled_in


def test_the_example_of_an_edited_card_loads_what_was_pushed(hub, compressed, tmp_path):
    assert push(compressed, "alice/edited")[0] == 0
    first = hub.history("alice/edited")[1].oid
    card = hub.files("alice/edited")["README.md"].decode().replace("## Limits\n", "## Mine\n").replace("\n", "\r\n")
    card += f'\r\nrepo, revision = "alice/edited", "{"0" * 40}"\r\nrepo, revision = "bob/other", "{first}"\r\n'
    hub.add("alice/edited", {"README.md": card})
    compress_llava(SHIPPED_LLAVA, tmp_path / "other", 9, 0.5)
    code, out, error = push(tmp_path / "other", "alice/edited")
    assert code == 0 and "was kept" in error
    second = hub.history("alice/edited")[1].oid
    assert f"The revision to pin is {second}." in out
    assert json.loads(hub.files("alice/edited", second)["config.json"])["vmtc_num_visual_tokens"] == 9
    pin = 'repo, revision = "alice/edited", "{}"\r\n'
    assert card.count(pin.format(first)) == 1
    assert hub.files("alice/edited")["README.md"].decode() == card.replace(pin.format(first), pin.format(second))
    history = hub.history("alice/edited")
    assert push(tmp_path / "other", "alice/edited")[0] == 0 and hub.history("alice/edited") == history


@pytest.fixture
def measured(tmp_path):
    """Folders of results, each of another number of questions, by that number."""

    def write(number: int):
        folder = tmp_path / f"results-{number}"
        folder.mkdir()
        content = {
            "task": "easy-vqa",
            "scores": {"all": {"questions": number, "accuracy": 0.5}},
            "note": "Exact match.",
        }
        (folder / "results.json").write_text(json.dumps({**content, "settings": {"num_questions": number}}))
        return folder

    return write


def test_results_that_only_the_card_has_are_kept(hub, compressed, measured, caplog):
    def card() -> str:
        return hub.files("alice/results")["README.md"].decode()

    assert push(compressed, "alice/results", "--results", measured(2))[0] == 0
    history = hub.history("alice/results")
    code, out, error = push(compressed, "alice/results")
    assert code == 0 and "results that a new one would lack" in error
    assert hub.history("alice/results") == history and f"The revision to pin is {history[1].oid}." in out

    # With other code they are of the same model.
    old = hub.add("alice/results", {"vmtc.py": "old"})
    hub.add("alice/results", {"README.md": existing_card.pin_revision(card(), "alice/results", old)})
    assert "README.md of the repo was kept" in push(compressed, "alice/results")[2]
    head = hub.history("alice/results")[1].oid
    assert head != old and existing_card.pinned_revision(card(), "alice/results") == head
    assert "| all | 2 | 50.00% |" in card() and existing_card.is_unedited(card())

    assert "written anew" not in caplog.text
    assert "kept" not in push(compressed, "alice/results", "--results", measured(3))[2]
    assert "| all | 3 | 50.00% |" in card() and "| all | 2 |" not in card()
    message = "The README.md of alice/results is written anew, without what it had under Results; the commits before"
    assert message in caplog.text
    caplog.clear()
    assert "kept" not in push(compressed, "alice/results", "--overwrite-card")[2]
    assert "No evaluation of this model" in card() and "written anew" not in caplog.text


def test_training_that_only_the_card_has_is_kept(hub, compressed, measured, tmp_path):
    folder = shutil.copytree(compressed, tmp_path / "trained")
    recipe = {"model": "me/start", "output_dir": "phase1", "train": ["projector"], "data": {"path": "captions.json"}}
    recipe |= {"global_batch_size": 8, "training_arguments": {}}
    summary = {"recipe": recipe, "data": {"kept": 10}, "log": [{"step": 2, "train_loss": 0.5}]}
    (folder / "training_summary.json").write_text(json.dumps(summary))
    assert push(folder, "alice/trained")[0] == 0
    assert "README.md of the repo was kept" in push(compressed, "alice/trained")[2]
    trained = "| phase1 | projector | captions.json |"
    assert trained in hub.files("alice/trained")["README.md"].decode()

    # Also with results, and if another version of the library wrote the config.
    assert "README.md of the repo was kept" in push(compressed, "alice/trained", "--results", measured(2))[2]
    other = shutil.copytree(compressed, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0"}))
    old = hub.add("alice/trained", {"config.json": (other / "config.json").read_bytes(), "notes.json": "{}"})
    card = hub.files("alice/trained")["README.md"].decode()
    hub.add("alice/trained", {"README.md": existing_card.pin_revision(card, "alice/trained", old)})
    assert "README.md of the repo was kept" in push(compressed, "alice/trained")[2]
    assert trained in hub.files("alice/trained")["README.md"].decode()


def test_results_of_an_earlier_model_are_not_kept(hub, compressed, measured, tmp_path, monkeypatch, caplog):
    assert push(compressed, "alice/newer", "--results", measured(2))[0] == 0
    hub.add("alice/newer", {".eval_results/hle.yaml": "- dataset: {id: cais/hle, task_id: hle}\n  value: 1\n"})
    compress_llava(SHIPPED_LLAVA, tmp_path / "other", 9, 0.5)

    def fail(*_, **__):
        raise HTTPError("The connection was lost.")

    with monkeypatch.context() as patch:  # the new weights get there, the card does not
        patch.setattr(HfApi, "upload_file", fail)
        assert push(tmp_path / "other", "alice/newer")[0] == 1
    assert "alice/newer has .eval_results/hle.yaml from before, maybe the score of an earlier model." in caplog.text
    assert "| all | 2 | 50.00% |" in hub.files("alice/newer")["README.md"].decode()
    caplog.clear()
    code, _, error = push(tmp_path / "other", "alice/newer")
    assert code == 0 and "kept" not in error and ".eval_results" not in caplog.text
    assert "No evaluation of this model" in hub.files("alice/newer")["README.md"].decode()
    assert "is written anew, without what it had under Results" in caplog.text

    # Those of the new model are in place of those of the old one, and nothing is lost.
    assert push(tmp_path / "other", "alice/newer", "--results", measured(3))[0] == 0
    caplog.clear()
    assert push(compressed, "alice/newer", "--results", measured(4))[0] == 0
    assert "written anew" not in caplog.text


def test_a_local_folder_of_that_name_is_not_the_repo(hub, compressed, tmp_path, monkeypatch):
    hub.add("alice/here", {"README.md": "of the repo"})
    (tmp_path / "alice" / "here").mkdir(parents=True)
    (tmp_path / "alice" / "here" / "README.md").write_text(model_card.write_model_card(compressed, "here"))
    monkeypatch.chdir(tmp_path)
    assert push(compressed, "alice/here")[0] == 0
    assert hub.files("alice/here")["README.md"] == b"of the repo"


def test_weights_of_an_earlier_model_are_removed(hub, compressed):
    names = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
    stale = {"adapter_config.json", *names, *(f"{name}.index.json" for name in names)}
    stale |= {"chat_template.json", "additional_chat_templates/tools.jinja", "special_tokens_map.json"}
    for name in names:
        stem, ending = name.split(".")
        stale |= {f"{stem}-00002-of-00003.{ending}", f"{stem}.fp16.{ending}", f"{stem}.fp16-00001-of-00002.{ending}"}
        stale |= {f"{stem}-00001-of-00002.fp16.{ending}", f"{name}.index.fp16.json"}
    stale |= {"training_args.bin"}
    others = {"notes.txt", "model-notes.safetensors", "lora/adapter_config.json", "lora/adapter_model.safetensors"}
    hub.add("alice/stale", dict.fromkeys(stale | others, "old"))
    assert push(compressed, "alice/stale")[0] == 0
    files = hub.files("alice/stale", hub.history("alice/stale")[1].oid)  # that with the weights
    assert files["model.safetensors"] == (compressed / "model.safetensors").read_bytes()
    assert files.keys() & (stale | others) == {"model.safetensors"} | others


def test_a_push_in_between_is_not_mixed_with_this_one(hub, compressed, monkeypatch):
    def interrupt(method: str, files: dict) -> tuple[int, str, str]:
        upload = getattr(HfApi, method)

        def after_another(*args, **kwargs):
            hub.add("alice/between", files)
            return upload(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(HfApi, method, after_another)
            return push(compressed, "alice/between")

    code, out, error = interrupt("upload_folder", {"config.json": "{}"})
    assert code == 1 and out == ""
    assert "alice/between was changed by another push meanwhile, so this one stopped. Push again." in error
    assert hub.files("alice/between").keys() == {".gitattributes", "config.json"}
    code, _, error = interrupt("upload_file", {"README.md": "mine"})  # the weights are there already
    assert code == 1 and "was changed by another push meanwhile" in error
    code, _, error = push(compressed, "alice/between")
    assert code == 0 and "was kept" in error and hub.files("alice/between")["README.md"] == b"mine"


def test_a_model_that_cannot_be_written_leaves_no_repo(hub, tmp_path):
    copy_without_a_weight(tmp_path / "model")
    code, _, error = push(tmp_path / "model", "alice/incomplete")
    assert code == 1 and "lacks 1 weights" in error
    assert ("model", "alice/incomplete") not in hub.repos


def test_a_hub_that_does_not_answer(hub, compressed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        code, _, error = push(compressed, "alice/offline")
    assert code == 1 and "The Hub cannot be reached: " in error and "offline mode is enabled" in error
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
        code, _, error = push(compressed, "alice/offline")
    assert code == 1 and "The Hub cannot be reached: [Errno 111]" in error

    def break_off(*_, **__):
        raise HTTPError("The connection was lost.")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub._commit_api.lfs_upload", break_off)
        patch.setattr(hub, "large_files", {})  # so that there is something to upload
        code, _, error = push(compressed, "alice/offline")
    assert code == 1 and "The Hub cannot be reached: The connection was lost." in error


def test_a_bug_is_not_taken_for_the_network(hub, compressed, monkeypatch):
    def fail(*_):
        raise KeyError("bug")

    monkeypatch.setattr(publish, "download_card", fail)
    result = CliRunner().invoke(app, ["push", str(compressed), "alice/bug"])
    assert isinstance(result.exception, KeyError)


def test_a_private_repo(hub, compressed):
    assert push(compressed, "alice/secret", "--private")[0] == 0
    assert hub.repos["model", "alice/secret"].private
    hub.add("alice/public", {})
    code, _, error = push(compressed, "alice/public", "--private")
    assert code == 1 and "alice/public is there already, and public" in error
    assert "config.json" not in hub.files("alice/public")


@pytest.mark.parametrize(
    ("token", "arguments", "message"),
    [
        (None, ["alice/new"], "You are not logged in to the Hub. Run `hf auth login`"),
        ("hf_unknown", ["alice/new"], "The Hub does not accept your token: Invalid user token."),
        ("hf_bob", ["alice/new"], "You may not write to alice/new: 403 Forbidden"),
        ("hf_bob", ["alice/there"], "You may not write to alice/there: 403 Forbidden"),
        ("hf_alice", ["alice/a/b"], "A repo on the Hub cannot be called 'alice/a/b'"),
        (
            "hf_alice",
            ["alice/new", "--revision", "0" * 40],
            "is the name of a commit, to which nothing can be added. Name a branch.",
        ),
        *(
            ("hf_alice", ["alice/new", "--revision", name], f"A branch on the Hub cannot be called {name!r}.")
            for name in ("", "a b", "refs/pr/1", "-x", "a..b", "a//b", "a/", "a.lock", "a:b", "a\n")
        ),
        ("hf_alice", ["alice/new", "--results", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_pushed(hub, compressed, monkeypatch, token, arguments, message):
    """Each is found before anything is uploaded, or a repo made."""
    hub.add("alice/there", {})
    monkeypatch.setenv("HF_TOKEN", token or "")
    repos, number = set(hub.repos), len(hub.requests)
    code, out, error = push(compressed, *arguments)
    *progress, error = error.splitlines()  # of loading weights
    assert code == 1 and out == "" and error.startswith("error: ") and not any("error" in line for line in progress)
    assert message in error
    assert set(hub.repos) == repos
    assert not [request for request in hub.requests[number:] if "/commit/" in request.path]


def test_names_of_branches(hub, compressed):
    assert push(compressed, "alice/branches", "--revision", "feature/v1.2-a_b")[0] == 0
    for name in ("a b", "refs/pr/1", "0" * 40):
        with pytest.raises(HfHubHTTPError, match="Invalid branch name"):
            HfApi().create_branch("alice/branches", branch=name)
    assert hub.repos["model", "alice/branches"].branches.keys() == {"main", "feature/v1.2-a_b"}


def test_only_models_of_this_package_are_pushed(hub, tmp_path):
    number = len(hub.requests)
    (tmp_path / "empty").mkdir()
    for model, message in (
        (SHIPPED_LLAVA, "is a 'llava' model, not a 'ta_llava'"),
        (tmp_path / "empty", "No model could be loaded from"),
        ("alice/nothing", "No model could be loaded from 'alice/nothing'"),
    ):
        code, _, error = push(model, "alice/new")
        assert code == 1 and message in error and error.count("\n") == 1
    assert not [request for request in hub.requests[number:] if request.method == "POST"]
