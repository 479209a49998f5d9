"""
Compiled towers, prefills and decoding of both systems: no graph breaks, no graph but the first ones, the same answers. The
backends here make the graphs but no kernels, which would take minutes.
"""

import copy
from functools import partial

import pytest
import torch
from command_line import run
from conftest import (
    EXAMPLE_IMAGE,
    IMAGE,
    PAD,
    SHIPPED_LLAVA,
    SHIPPED_MODEL,
    build_llava,
    build_model,
    llava_inputs,
    llava_prompt,
    prompt_ids,
    random_images,
)
from functorch.compile import make_boxed_func
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_module_simplified
from transformers import CompileConfig, Dinov2Config, LlavaForConditionalGeneration, SiglipVisionConfig

from ta_llava import inference
from ta_llava.inference import answer, compile_model, load
from ta_llava.vision_language_model import is_compiled


TOLERANCE = {"atol": 5e-5, "rtol": 1e-4}
GENERATION = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": PAD, "do_sample": False}
NOVELTY = {"vmtc_kept_tokens": "importance_and_novelty", "vmtc_stage_placement": "last"}
BUILD = {
    "TA-LLaVA, Gemma-2": partial(build_model, "gemma2", text_kwargs={"num_hidden_layers": 4}),
    "TA-LLaVA with VMTC, Llama": partial(
        build_model,
        "llama",
        text_kwargs={"num_hidden_layers": 3},
        use_vmtc=True,
        vmtc_num_visual_tokens=4,
        vmtc_num_stages=1,
    ),
    "VMTC and CMAI, Llama": partial(build_llava, "llama"),
    "VMTC and CMAI, Gemma-2": partial(build_llava, "gemma2", **NOVELTY),
    "VMTC, Llama": partial(build_llava, "llama", use_cmai=False),
}
systems = pytest.mark.parametrize("name", BUILD)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bucket(model, lengths: tuple[int, ...], seed: int, size: int = 32) -> dict[str, torch.Tensor]:
    """Prompts with an image whose questions have these lengths, padded on the left to `size` columns."""
    is_ta_llava = model.config.model_type == "ta_llava"
    write = prompt_ids if is_ta_llava else llava_prompt
    rows = [write(length, length) for length in lengths]
    rows = [[PAD] * (size - len(row)) + row for row in rows]
    ids = torch.tensor(rows)
    images = random_images(len(rows), seed=seed) if is_ta_llava else llava_inputs(rows, seed=seed)["pixel_values"]
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": images}


def stance(is_first: bool) -> torch.compiler.set_stance:
    """Lets only the first prompt make graphs."""
    return torch.compiler.set_stance("default" if is_first else "fail_on_recompile")


# --- the tower -----------------------------------------------------------------------------------------------------


SIZES = {"hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 3, "image_size": 24, "patch_size": 4}
TOWERS = {
    "TA-LLaVA": partial(build_model, use_vmtc=True, vmtc_num_visual_tokens=4, vmtc_num_stages=1),
    "LLaVA": build_llava,
    "LLaVA, novel tokens": partial(build_llava, **NOVELTY),
    "LLaVA, SigLIP": partial(
        build_llava,
        vision_config=SiglipVisionConfig(**SIZES, intermediate_size=32),
        vision_feature_select_strategy="full",
    ),
    "LLaVA, DINOv2": partial(build_llava, vision_config=Dinov2Config(**SIZES, mlp_ratio=2)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_a_compiled_tower_with_vmtc(name):
    model = TOWERS[name]()
    eager = copy.deepcopy(model)
    graphs = CompileCounterWithBackend("aot_eager")
    model.model.vision_tower.compile(fullgraph=True, backend=graphs)
    for seed in range(3):
        images = bucket(model, (5, 6), seed)["pixel_values"]
        with stance(seed == 0):
            features = model.get_vision_features(images)
        torch.testing.assert_close(features, eager.get_vision_features(images), **TOLERANCE)
    assert graphs.frame_count == 1


# --- prefill and decoding ------------------------------------------------------------------------------------------


@systems
def test_prompts_and_images_share_the_graphs(name):
    """Of a cold model: one graph for all prefills and one for all decoding steps, and one for the tower in front of them."""
    model = BUILD[name]()
    eager = copy.deepcopy(model)
    graphs, of_tower = CompileCounterWithBackend("aot_eager"), CompileCounterWithBackend("aot_eager")
    model.compile(fullgraph=True, backend=graphs)
    model.model.vision_tower.compile(fullgraph=True, backend=of_tower)
    options = {**GENERATION, "output_logits": True, "return_dict_in_generate": True}
    for seed, lengths in enumerate([(5, 9), (8, 2), (7, 6)]):
        inputs = bucket(model, lengths, seed)
        with stance(seed == 0):
            compiled = model.generate(**inputs, **options, cache_implementation="static")
        expected = eager.generate(**inputs, **options)
        assert torch.equal(compiled.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(compiled.logits), torch.stack(expected.logits), **TOLERANCE)
    assert graphs.frame_count == 2
    assert of_tower.frame_count <= 1  # TA-LLaVA's is a part of the prefill


@pytest.mark.parametrize("name", ["TA-LLaVA with VMTC, Llama", "VMTC and CMAI, Llama"])
def test_a_second_bucket_makes_graphs_for_all_lengths(name):
    """
    The compiler then takes the length for a variable, but not of the buffers of CMAI. The cache is as long as the longest
    bucket needs.
    """
    model = BUILD[name]()
    eager = copy.deepcopy(model)
    graphs = CompileCounterWithBackend("eager")
    model.compile(fullgraph=True, backend=graphs)
    sizes = (64, 32, 64, 32) if model.config.model_type != "ta_llava" else (64, 32, 48, 64, 32)
    for index, size in enumerate(sizes):
        inputs = bucket(model, (5, 9), size, size)
        with stance(index < 2):
            compiled = model.generate(**inputs, **GENERATION, cache_implementation="static")
        assert torch.equal(compiled, eager.generate(**inputs, **GENERATION))
    assert graphs.frame_count == (3 if len(sizes) == 5 else 4)  # decoding stays as it is without CMAI


@pytest.mark.parametrize("name", ["TA-LLaVA with VMTC, Llama", "VMTC and CMAI, Llama"])
def test_the_library_compiles_the_decoding(name, monkeypatch):
    """It does so on a GPU. A model that is compiled already stays as it is."""
    for compiled_already in (False, True):
        model = BUILD[name]()
        inputs = [bucket(model, lengths, seed) for seed, lengths in enumerate([(5, 9), (8, 2)])]
        expected = [model.generate(**each, **GENERATION) for each in inputs]
        if compiled_already:
            model.compile(fullgraph=True, backend="eager")
        graphs = CompileCounterWithBackend("eager")
        config = CompileConfig(fullgraph=True, backend=graphs, mode=None)
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "_valid_auto_compile_criteria", lambda *args: True)
            for index, each in enumerate(inputs):
                with stance(index == 0):
                    given = model.generate(**each, **GENERATION, cache_implementation="static", compile_config=config)
                assert torch.equal(given, expected[index])
        torch._dynamo.reset()


@pytest.mark.parametrize("name", ["TA-LLaVA with VMTC, Llama", "VMTC and CMAI, Llama"])
def test_a_next_turn_goes_on_with_the_cache(name):
    model = BUILD[name]()
    eager = copy.deepcopy(model)
    model.compile(fullgraph=True, backend="eager")
    options = {**GENERATION, "return_dict_in_generate": True}
    inputs = bucket(model, (5, 9), 0)
    model._previous_max_cache_length = 64  # as after a longer prompt
    first = model.generate(**inputs, **options, cache_implementation="static")
    question = torch.randint(10, 50, (2, 6))
    ids = torch.cat([first.sequences, question], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, ids.shape[1] - 32, dtype=torch.long)], dim=1)
    turn = {"input_ids": ids, "attention_mask": mask}
    second = model.generate(**turn, **options, past_key_values=first.past_key_values)
    expected = eager.generate(**{**inputs, **turn}, **GENERATION)
    assert torch.equal(second.sequences, expected)


def test_rows_with_different_images_with_cmai():
    """Text before images, two images, and a row without any: the buffers hold the most of each."""
    model = BUILD["VMTC and CMAI, Llama"]()
    eager = copy.deepcopy(model)
    model.compile(fullgraph=True, backend="eager")
    for seed, images in enumerate([(2, 0, 1), (1, 2, 0), (0, 0, 0)]):
        rows = [llava_prompt(5 + index, index, images=count) for index, count in enumerate(images)]
        rows = [[PAD] * (48 - len(row)) + row for row in rows]
        inputs = llava_inputs(rows, seed=seed)
        inputs["attention_mask"] = (inputs["input_ids"] != PAD).long()
        with stance(seed != 1):
            given = model.generate(**inputs, **GENERATION, cache_implementation="static")
        assert torch.equal(given, eager.generate(**inputs, **GENERATION))


# --- what CUDA graphs need -----------------------------------------------------------------------------------------


def addresses(cache) -> list[int]:
    """Of all tensors that the layers of a cache keep."""
    return [value.data_ptr() for layer in cache.layers for value in vars(layer).values() if torch.is_tensor(value)]


@pytest.mark.parametrize("name", ["TA-LLaVA, Gemma-2", "VMTC and CMAI, Llama"])
def test_the_cache_stays_where_it_is(name):
    model = BUILD[name]()
    model.compile(fullgraph=True, backend="eager")
    static = {**GENERATION, "cache_implementation": "static", "return_dict_in_generate": True}
    first = model.generate(**bucket(model, (5, 9), 0), **static).past_key_values
    kept = addresses(first)
    second = model.generate(**bucket(model, (7, 2), 1), **static).past_key_values
    assert second is first and addresses(second) == kept
    # The library tells the compiler so only of what is allocated outside of graphs.
    static_tensors = [
        value
        for layer in first.layers
        for key, value in vars(layer).items()
        if torch.is_tensor(value) and key != "image_columns"
    ]
    assert all(hasattr(value, "_dynamo_static_input_type") for value in static_tensors)
    with torch.compiler.set_stance("force_eager"):
        other = model.generate(**bucket(model, (7, 2, 4), 1), **static).past_key_values
        assert other is not first and len(other.layers[0].keys) == 3
        with torch.inference_mode():  # tensors of this mode cannot be written outside of it
            assert model.generate(**bucket(model, (7, 2, 4), 1), **static).past_key_values is not other


def test_a_cache_whose_rows_beams_have_moved_is_not_used_again():
    model = BUILD["VMTC and CMAI, Llama"]()
    static = {**GENERATION, "cache_implementation": "static", "return_dict_in_generate": True}
    eager = model.generate(**bucket(model, (7, 2, 5, 9), 1), **static).sequences
    model.compile(fullgraph=True, backend="eager")
    with torch.compiler.set_stance("force_eager"):
        moved = model.generate(**bucket(model, (5, 9), 0), **static, num_beams=2).past_key_values
        after = model.generate(**bucket(model, (7, 2, 5, 9), 1), **static)
    assert after.past_key_values is not moved
    assert torch.equal(after.sequences, eager)


def test_autocast_decides_the_dtype_of_the_keys():
    model = BUILD["VMTC and CMAI, Llama"]()
    model.compile(fullgraph=True, backend="eager")
    static = {**GENERATION, "cache_implementation": "static", "return_dict_in_generate": True}
    with torch.compiler.set_stance("force_eager"), torch.autocast("cpu", torch.bfloat16):
        assert (
            model.generate(**bucket(model, (5, 9), 0), **static).past_key_values.layers[0].values.dtype
            == torch.bfloat16
        )


def test_wrong_numbers_of_placeholders_are_refused_before_the_graph():
    model = BUILD["VMTC and CMAI, Llama"]()
    model.compile(fullgraph=True, backend="eager")
    inputs = bucket(model, (5, 9), 0)
    inputs["input_ids"][0, inputs["input_ids"][0].tolist().index(IMAGE)] = 11
    with pytest.raises(ValueError, match="has 17 image placeholders .* there are 18 visual tokens"):
        model.generate(**inputs, **GENERATION, cache_implementation="static")


def test_only_the_new_placeholders_of_a_later_turn_are_counted():
    model = BUILD["VMTC and CMAI, Llama"]()
    first, turn = bucket(model, (5, 9), 0), bucket(model, (7, 2), 1)
    static = {**GENERATION, "cache_implementation": "static", "return_dict_in_generate": True}
    whole = {name: torch.cat([first[name], turn[name]], dim=1) for name in ("input_ids", "attention_mask")}

    def answer_second_turn() -> torch.Tensor:
        cache = model.generate(**first, **{**static, "max_new_tokens": 40}).past_key_values
        cache.reset()
        model(**first, past_key_values=cache)
        return model.generate(**whole, pixel_values=turn["pixel_values"], past_key_values=cache, **GENERATION)

    expected = answer_second_turn()
    model.compile(fullgraph=True, backend="eager")
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(answer_second_turn(), expected)


def test_a_cache_that_was_emptied_has_forgotten_the_counts_of_its_prompt():
    model = BUILD["VMTC and CMAI, Llama"]()
    model.compile(fullgraph=True, backend="eager")
    static = {**GENERATION, "cache_implementation": "static", "return_dict_in_generate": True}
    cache = model.generate(**bucket(model, (5, 9), 0), **static).past_key_values
    assert cache.layers[0].reserved_counts is not None
    cache.reset()
    assert cache.layers[0].reserved_counts is None


def test_both_ways_to_compile_a_model_are_seen():
    models = [build_model(text_kwargs={"num_hidden_layers": 1}) for _ in range(4)]
    models[0].compile(backend="eager")
    models[1].forward = torch.compile(models[1].forward, backend="eager")
    models[2].forward = torch.compiler.disable(models[2].forward)
    assert list(map(is_compiled, models)) == [True, True, False, False]


def test_a_model_that_is_not_compiled_makes_a_cache_for_each_call():
    model = BUILD["VMTC and CMAI, Llama"]()
    static = {**GENERATION, "cache_implementation": "static", "disable_compile": True, "return_dict_in_generate": True}
    first, second = (model.generate(**bucket(model, (5, 9), 0), **static).past_key_values for _ in range(2))
    assert first is not second


@pytest.mark.parametrize("name", ["TA-LLaVA with VMTC, Llama", "VMTC and CMAI, Llama"])
def test_graphs_hold_no_numbers_of_python(name):
    """Such a tensor would be on the CPU, and a graph with it would not become a CUDA graph."""
    constants: list[str] = []
    sizes = []

    def inspect(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        constants.extend(node.name for node in graph.graph.nodes if node.op == "get_attr")
        return make_boxed_func(graph.forward)

    model = BUILD[name]()
    backend = partial(aot_module_simplified, fw_compiler=inspect)
    model.compile(fullgraph=True, backend=backend)
    model.model.vision_tower.compile(fullgraph=True, backend=backend)
    model.generate(**bucket(model, (5, 9), 0), **GENERATION, cache_implementation="static")
    assert len(sizes) >= 2 and not constants


# --- the command line ----------------------------------------------------------------------------------------------

QUESTIONS = [
    ([EXAMPLE_IMAGE], "what color is the shape?"),
    ([EXAMPLE_IMAGE], "is there a circle in the image?"),
    ([EXAMPLE_IMAGE], "what shape is in the image?"),
]


@pytest.fixture
def graphs(monkeypatch) -> CompileCounterWithBackend:
    """Counts graphs of `compile_model`, and makes them without kernels."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(inference, "compile_model", partial(compile_model, backend=counter))
    return counter


@pytest.mark.parametrize(
    ("folder", "flags"),
    [(SHIPPED_MODEL, {}), (SHIPPED_LLAVA, {}), (SHIPPED_LLAVA, {"num_visual_tokens": 16, "cmai_max_ratio": 0.6})],
)
def test_answers_of_a_compiled_model(folder, flags, graphs):
    """The last batch is filled up, so that it has no graphs of its own."""
    model, processor = load(folder, **flags, compiled=True)
    expected = list(answer(*load(folder, **flags), QUESTIONS))
    assert list(answer(model, processor, QUESTIONS, batch_size=2)) == expected == ["teal", "no", "triangle"]
    count = graphs.frame_count
    assert count == (2 if folder == SHIPPED_MODEL else 3)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert list(answer(model, processor, QUESTIONS[::-1], batch_size=2)) == expected[::-1]
    assert "cache_implementation" not in model.generation_config.to_diff_dict()  # what would be saved with the model


def test_what_cannot_be_compiled(monkeypatch):
    stock = LlavaForConditionalGeneration.from_pretrained(SHIPPED_LLAVA)
    with pytest.raises(ValueError, match="the model is a LlavaForConditionalGeneration"):
        compile_model(stock)
    model = build_llava()
    model.hf_device_map = {"model.vision_tower": 0, "model.language_model": 1}
    with pytest.raises(ValueError, match="on 2 devices"):
        compile_model(model)
    del model.hf_device_map
    monkeypatch.setattr(inference.shutil, "which", lambda name: None)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
            compile_model(model)
    assert model._compiled_call_impl is None


def test_ask_and_evaluate_compile(graphs, tmp_path):
    assert run("ask", EXAMPLE_IMAGE, QUESTIONS[0][1], "--compile") == (0, "teal\n", "")
    assert graphs.frame_count == 2
    evaluate = ("evaluate", SHIPPED_LLAVA, "--questions", 5, "--batch-size", 4, "--max-new-tokens", 4)
    code, _, error = run(*evaluate, "-o", tmp_path / "compiled", "--compile")
    assert code == 0, error
    assert graphs.frame_count == 2 + 3
    assert run(*evaluate, "-o", tmp_path / "eager")[0] == 0
    compiled, eager = ((tmp_path / name / "predictions.jsonl").read_text() for name in ("compiled", "eager"))
    assert compiled == eager
