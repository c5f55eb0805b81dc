"""Model families: one file each, wiring only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gllm.runtime.models.chatglm import ChatGlm
from gllm.runtime.models.glm4 import Glm, Glm4
from gllm.runtime.models.llama import Llama
from gllm.runtime.models.mixtral import Mixtral
from gllm.runtime.models.qwen2 import Qwen2
from gllm.runtime.models.qwen2_moe import Qwen2Moe
from gllm.runtime.models.qwen3 import Qwen3
from gllm.runtime.models.qwen3_moe import Qwen3Moe

if TYPE_CHECKING:
    from gllm.runtime.models.stage import StageModel

MODELS: dict[str, type[StageModel]] = {
    "ChatGLMForConditionalGeneration": ChatGlm,
    "ChatGLMModel": ChatGlm,
    "Glm4ForCausalLM": Glm4,
    "GlmForCausalLM": Glm,
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Llama,
    "MixtralForCausalLM": Mixtral,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen2MoeForCausalLM": Qwen2Moe,
    "Qwen3ForCausalLM": Qwen3,
    "Qwen3MoeForCausalLM": Qwen3Moe,
}
"""The class that runs each architecture of `gllm.runtime.model_config.ARCHITECTURES`."""
