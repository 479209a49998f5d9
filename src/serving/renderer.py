"""How vLLM makes the tokens of a prompt of TA-LLaVA."""

from typing import Any

from vllm.renderers.hf import HfRenderer

from ..processing_ta_llava import TaLlavaProcessor


class TaLlavaRenderer(HfRenderer):
    """Takes the `<image>`s out of the text of a prompt, as the processor does, before it is tokenized."""

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        if not prompt.get("multi_modal_data"):
            return super()._tokenize_prompt(prompt, params)
        processor: TaLlavaProcessor = self.get_mm_processor().info.get_hf_processor()
        text, _ = processor._take_out_image_tokens(prompt["prompt"])
        return super()._tokenize_prompt({**prompt, "prompt": text}, params)
