"""The OpenAI server of vLLM with both systems, asked by the `openai` client over loopback."""

import base64
import io
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import openai
import pytest
from conftest import EXAMPLE_IMAGE, ROOT, SHIPPED_LLAVA, SHIPPED_MODEL
from PIL import Image
from transformers import AutoTokenizer
from vllm_engines import Request, ask_generate

from ta_llava.building.compress import compress_llava
from ta_llava.encoded_images import shorten


START_SECONDS = 240
QUESTIONS = ["what color is the shape?", "is there a circle in the image?", "what shape is in the image?"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module", params=["ta-llava", "vmtc"])
def server(request, tmp_path_factory):
    """A client of a server, the folder that it serves, and the server's process."""
    folder = SHIPPED_MODEL
    if request.param == "vmtc":
        folder = tmp_path_factory.mktemp("server") / "model"
        compress_llava(SHIPPED_LLAVA, folder, num_visual_tokens=16)
    port, log = free_port(), tmp_path_factory.mktemp("log") / "log.txt"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "256", "--allowed-local-media-path", str(ROOT / "examples")]
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=tmp_path_factory.mktemp("cwd"), env=os.environ
        )
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=2, timeout=60)
        try:
            wait_until_ready(client, process, log)
            yield client, folder, process
        finally:
            process.terminate()
            process.wait(timeout=30)


def wait_until_ready(client, process, log) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            time.sleep(1)
    raise AssertionError(f"The server did not start in {START_SECONDS} seconds: {log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def files():
    """The address of a server of the example images."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(ROOT / "examples"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def base64_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def messages(question, *urls):
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


def ask(client, question, *urls, **kwargs):
    arguments = {"model": "model", "temperature": 0, "max_tokens": 8, **kwargs}
    return client.chat.completions.create(messages=messages(question, *urls), **arguments)


def test_images_by_url_base64_and_file(server, files):
    client, folder, _ = server
    [expected] = ask_generate(folder, [Request([Image.open(EXAMPLE_IMAGE)], QUESTIONS[0])])
    urls = [f"{files}/{EXAMPLE_IMAGE.name}", base64_url(EXAMPLE_IMAGE.read_bytes()), EXAMPLE_IMAGE.as_uri()]
    for url in urls:
        answer = ask(client, QUESTIONS[0], url)
        assert answer.choices[0].message.content == "teal"
        assert answer.usage.prompt_tokens == len(expected.prompt_ids)


def test_streaming(server):
    client, _, _ = server
    url = base64_url(EXAMPLE_IMAGE.read_bytes())
    chunks = [chunk.choices[0].delta.content or "" for chunk in ask(client, QUESTIONS[2], url, stream=True)]
    assert "".join(chunks) == "triangle"


def test_several_clients_at_once(server):
    """Some ask about two images, and some about none."""
    client, folder, _ = server
    url, image = base64_url(EXAMPLE_IMAGE.read_bytes()), Image.open(EXAMPLE_IMAGE)
    asked = [(QUESTIONS[n % 3], n % 4 % 3) for n in range(24)]
    expected = ask_generate(folder, [Request([image] * count, question) for question, count in asked])
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda each: ask(client, each[0], *[url] * each[1]), asked))
    assert [answer.usage.prompt_tokens for answer in answers] == [len(answer.prompt_ids) for answer in expected]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in expected]
    assert [answer.choices[0].message.content for answer in answers] == texts


BAD_IMAGES = {
    "text": (base64_url(b"not an image"), "is not a readable image, or truncated: its format is unknown"),
    "truncated": (base64_url(EXAMPLE_IMAGE.read_bytes()[:60]), "is not a readable image, or truncated: "),
    "no base64": ("data:image/png;base64,a$b", "is not encoded in base64"),
    "no file": ((ROOT / "examples" / "missing.png").as_uri(), "cannot be read: No such file"),
    "no base64 URL": ("data:image/png,abc", "cannot be fetched: "),
    "no page": ("{files}/missing.png", "cannot be fetched: "),
    "no server": ("http://127.0.0.1:9/image.png", "cannot be fetched: "),
    "a page": ("{files}/questions.jsonl", "is not a readable image, or truncated: its format is unknown"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_refused_and_the_server_lives_on(server, files, name):
    client, _, _ = server
    url, reason = BAD_IMAGES[name]
    url = url.format(files=files)
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, QUESTIONS[0], url)
    shown = "file://<path>" if url.startswith("file") else shorten(url)  # vLLM takes paths out of messages
    assert f"The image {shown!r} {reason}" in error.value.body["message"]
    assert_alive(server)


def test_images_that_are_not_rgb_are_read_as_by_generate(server):
    """Of 16 bits, half transparent, and with one transparent colour."""
    client, folder, _ = server
    gray = Image.fromarray(np.asarray(Image.open(EXAMPLE_IMAGE).convert("L")).astype(np.uint16) * 257)
    transparent = Image.open(EXAMPLE_IMAGE).convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    opaque = Image.open(EXAMPLE_IMAGE).convert("RGB")
    asked = []
    for image, options in ((gray, {}), (transparent, {}), (opaque, {"transparency": opaque.getpixel((0, 0))})):
        image.save(buffer := io.BytesIO(), "PNG", **options)
        asked.append(buffer.getvalue())
    requests = [Request([Image.open(io.BytesIO(content))], QUESTIONS[0]) for content in asked]
    for content, expected in zip(asked, ask_generate(folder, requests)):
        answer = ask(client, QUESTIONS[0], base64_url(content), logprobs=True)
        [first, *_] = answer.choices[0].logprobs.content
        assert abs(first.logprob - float(expected.log_probabilities[expected.ids[0]])) < 2e-3


def test_a_prompt_that_is_too_long_is_refused(server):
    client, _, _ = server
    with pytest.raises(openai.BadRequestError, match="256"):
        ask(client, "what shape is in the image? " * 100, base64_url(EXAMPLE_IMAGE.read_bytes()))
    assert_alive(server)


def test_aborted_requests_leave_the_server_alive(server):
    client, _, _ = server
    url = base64_url(EXAMPLE_IMAGE.read_bytes())
    for _ in range(4):
        stream = ask(client, QUESTIONS[0], url, stream=True, max_tokens=200, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    assert_alive(server)


def test_truncation_never_cuts_an_image(server):
    client, _, _ = server
    url = base64_url(EXAMPLE_IMAGE.read_bytes())
    with pytest.raises(openai.BadRequestError, match="truncate_prompt_tokens"):
        ask(client, QUESTIONS[0], url, extra_body={"truncate_prompt_tokens": 2})
    assert_alive(server)


def test_placeholders_in_a_prompt_without_an_image_are_only_text(server):
    client, _, _ = server
    assert client.completions.create(model="model", prompt=[6] * 20, max_tokens=2).choices
    assert_alive(server)


def assert_alive(server) -> None:
    client, _, process = server
    assert process.poll() is None
    answer = ask(client, QUESTIONS[0], base64_url(EXAMPLE_IMAGE.read_bytes()))
    assert answer.choices[0].message.content == "teal"
