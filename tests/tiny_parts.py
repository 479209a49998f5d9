"""What small models are built from: tokenizers, image processors, language models and vision towers, saved as on the Hub."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from chat_templates_of_models import GEMMA, LLAMA_2, LLAMA_3, MISTRAL, SMOLLM2
from conftest import make_lively, text_config
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


IMAGE_SIZE, PATCH_SIZE = 24, 4
SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
CORPUS = [
    "user USER: model assistant ASSISTANT: system [INST] what is in the image? [/INST] the model is an assistant.",
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful answers.",
    "Is the model an assistant, or the ASSISTANT a model? Compare the two. An answer. First answer. Second answer.",
]
# Of each family: backbone, template, special tokens, response marker, end of turn.
LANGUAGE_MODELS = {
    "gemma": ("gemma2", GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<start_of_turn>model", "<end_of_turn>"),
    "chatml": ("qwen2", SMOLLM2, ["<|im_start|>", "<|im_end|>"], "<|im_start|>assistant", "<|im_end|>"),
    "llama3": (
        "llama",
        LLAMA_3,
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|start_header_id|>assistant<|end_header_id|>",
        "<|eot_id|>",
    ),
    "llama2": ("llama", LLAMA_2, [], "[/INST]", "</s>"),
    "mistral": ("mistral", MISTRAL, [], "[/INST]", "</s>"),
}


def build_tokenizer(
    kind: str,
    extra: Sequence[str] = (),
    special_tokens: dict[str, str] = SPECIAL_TOKENS,
    words: Sequence[str] = (),
    corpus: Iterable[str] = (),
    vocab_size: int = 0,
    starts_with_bos: bool = False,
    **kwargs,
) -> PreTrainedTokenizerFast:
    """
    A tokenizer of one of three kinds. The ids start with `special_tokens` and `extra`, in this order.

    Args:
        kind (`str`):
            "words" has a token for each of `words`. "bytes" is byte-level BPE, as GPT-2 has it. "sentencepiece" is BPE as
            Llama-2 has it, where a token at the start of a text differs from the same token further on.
        corpus (`Iterable[str]`):
            Texts from which BPE learns its merges; without them each byte is a token.
        vocab_size (`int`):
            Size to which BPE learns ("sentencepiece" has 60 more).
        starts_with_bos (`bool`):
            Whether the BOS token comes before each text.
    """
    special = [*special_tokens.values(), *extra]
    if kind == "words":
        tokens = [*special, *words]
        backend = Tokenizer(models.WordLevel({token: id for id, token in enumerate(tokens)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    elif kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(corpus, trainer)
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size + 60, special_tokens=[*special, *bytes_], show_progress=False
        )
        # Word by word, so that no token has several words.
        words = [word for line in corpus for word in line.replace(" ", " ▁").split(" ")]
        backend.train_from_iterator(words, trainer)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if starts_with_bos:
        bos = special_tokens["bos_token"]
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, special.index(bos))])
    return PreTrainedTokenizerFast(
        **{"tokenizer_object": backend, "additional_special_tokens": list(extra), **special_tokens, **kwargs}
    )


def build_image_processor(size: int = IMAGE_SIZE) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def save_language_model(
    folder: Path,
    family: str = "chatml",
    dtype: torch.dtype = torch.float32,
    unused: tuple[str, ...] = (),
    spare_rows: int = 0,
    rows: int | None = None,
    with_template: bool = True,
    **config_kwargs,
) -> Path:
    backbone, template, extra, _, _ = LANGUAGE_MODELS[family]
    tokenizer = build_tokenizer(
        "sentencepiece" if family in ("llama2", "mistral") else "bytes",
        [*extra, *unused],
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        corpus=CORPUS,
        vocab_size=340,
        chat_template=template if with_template else None,
    )
    config = text_config(
        backbone,
        **{
            "vocab_size": rows or len(tokenizer) + spare_rows,
            "num_hidden_layers": 4,
            "max_position_embeddings": 512,
            "pad_token_id": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **config_kwargs,
        },
    )
    torch.manual_seed(0)
    model = make_lively(AutoModelForCausalLM.from_config(config)).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tower(folder: Path, kind: str = "clip_vision", dtype: torch.dtype = torch.float32) -> Path:
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    torch.manual_seed(1)
    if kind == "clip":
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = CLIPModel(CLIPConfig(vision_config=sizes, text_config={**text, "vocab_size": 50}, projection_dim=8))
    else:
        config_class, model_class = {
            "clip_vision": (CLIPVisionConfig, CLIPVisionModel),
            "siglip": (SiglipVisionConfig, SiglipVisionModel),
            "dinov2": (Dinov2Config, Dinov2Model),
        }[kind]
        model = model_class(config_class(**sizes))
    make_lively(model).to(dtype).save_pretrained(folder)
    build_image_processor(IMAGE_SIZE).save_pretrained(folder)
    return folder
