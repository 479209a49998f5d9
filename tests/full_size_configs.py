"""Configs of models at the sizes that people use."""

from transformers import CLIPVisionConfig, Gemma2Config, LlamaConfig


CLIP_LARGE = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
GEMMA_2_9B = Gemma2Config(
    hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16, vocab_size=256000
)
VICUNA_13B = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
LLAMA_405B = LlamaConfig(
    hidden_size=16384,
    intermediate_size=53248,
    num_hidden_layers=126,
    num_attention_heads=128,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
)
