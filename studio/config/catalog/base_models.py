"""The base models that built-in configs name: one table to extend. A model is a line of it, its sizes one of SHAPES.

Ids are those of the Hugging Face hub and of ModelScope. Sizes are those of each model's published config.json.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """An architecture's sizes, as its config.json has them. `num_billions` is set where they do not tell the number
    of weights: mixtures of experts. `details` are further keys of that config.json."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tied: bool = False
    head_dim: int = 0
    num_billions: float = 0.0

    def config(self) -> dict[str, Any]:
        """The part of config.json that says how large the model is."""
        sizes = {
            name: getattr(self, name)
            for name in (
                "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "intermediate_size", "vocab_size",
            )
        }  # fmt: skip
        return sizes | {"tie_word_embeddings": self.tied} | ({"head_dim": self.head_dim} if self.head_dim else {})

    @property
    def billions(self) -> float:
        """Weights, in billions: as published, else counted as a Llama has them (within a few in a hundred)."""
        if self.num_billions:
            return self.num_billions
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        attention = 2 * self.hidden_size * head_dim * (self.num_attention_heads + self.num_key_value_heads)
        num_matrices = 2 if self.model_type == "gpt_bigcode" else 3
        layer = attention + num_matrices * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return (self.num_hidden_layers * layer + embeddings) / 1e9


@dataclass(frozen=True)
class KnownModel:
    """A base model by the name that built-in configs have for it.

    `template` is XTuner's prompt template; "" takes the chat template of the model's own tokenizer. `context` is the
    longest sequence that it was made for, in tokens.
    """

    key: str
    hub_id: str
    modelscope_id: str
    shape: Shape
    template: str
    context: int

    @property
    def family(self) -> str:
        """`internlm2_5` of internlm2_5_chat_7b: the longest of FAMILIES that the key begins with."""
        return max((family for family in FAMILIES if self.key.startswith(family)), key=len, default=self.key)


FAMILIES = (
    "baichuan", "baichuan2", "chatglm2", "chatglm3", "cohere", "deepseek", "gemma", "gemma2", "gemma3", "internlm",
    "internlm2", "internlm2_5", "internlm3", "llama", "llama2", "llama3", "llama3_1", "llama3_2", "llama3_3", "minicpm",
    "mistral", "mixtral", "phi3", "phi3_5", "phi4", "qwen", "qwen1_5", "qwen2_5", "qwen3", "starcoder", "vicuna", "yi",
    "zephyr",
)  # fmt: skip

SHAPES = {
    "baichuan_7b": Shape("baichuan", 4096, 32, 32, 32, 11008, 64000),
    "baichuan_13b": Shape("baichuan", 5120, 40, 40, 40, 13696, 64000),
    "baichuan2_7b": Shape("baichuan", 4096, 32, 32, 32, 11008, 125696),
    "baichuan2_13b": Shape("baichuan", 5120, 40, 40, 40, 13696, 125696),
    "chatglm_6b": Shape("chatglm", 4096, 28, 32, 2, 13696, 65024),
    "command_r_plus": Shape("cohere", 12288, 64, 96, 8, 33792, 256000, tied=True),
    "deepseek_coder_6_7b": Shape("llama", 4096, 32, 32, 32, 11008, 32256),
    "deepseek_llm_7b": Shape("llama", 4096, 30, 32, 32, 11008, 102400),
    "deepseek_moe_16b": Shape("deepseek", 2048, 28, 16, 16, 10944, 102400, num_billions=16.4),
    "deepseek_v2": Shape("deepseek_v2", 5120, 60, 128, 128, 12288, 102400, num_billions=235.7),
    "deepseek_v2_lite": Shape("deepseek_v2", 2048, 27, 16, 16, 10944, 102400, num_billions=15.7),
    "gemma_2b": Shape("gemma", 2048, 18, 8, 1, 16384, 256000, tied=True, head_dim=256),
    "gemma_7b": Shape("gemma", 3072, 28, 16, 16, 24576, 256000, tied=True, head_dim=256),
    "gemma2_2b": Shape("gemma2", 2304, 26, 8, 4, 9216, 256000, tied=True, head_dim=256),
    "gemma2_9b": Shape("gemma2", 3584, 42, 16, 8, 14336, 256000, tied=True, head_dim=256),
    "gemma2_27b": Shape("gemma2", 4608, 46, 32, 16, 36864, 256000, tied=True, head_dim=128),
    "gemma3_1b": Shape("gemma3_text", 1152, 26, 4, 1, 6912, 262144, tied=True, head_dim=256),
    "gemma3_4b": Shape("gemma3_text", 2560, 34, 8, 4, 10240, 262208, tied=True, head_dim=256),
    "gemma3_12b": Shape("gemma3_text", 3840, 48, 16, 8, 15360, 262208, tied=True, head_dim=256),
    "gemma3_27b": Shape("gemma3_text", 5376, 62, 32, 16, 21504, 262208, tied=True, head_dim=128),
    "internlm_7b": Shape("internlm", 4096, 32, 32, 32, 11008, 103168),
    "internlm_20b": Shape("internlm", 5120, 60, 40, 40, 13824, 103168),
    "internlm2_1_8b": Shape("internlm2", 2048, 24, 16, 8, 8192, 92544),
    "internlm2_7b": Shape("internlm2", 4096, 32, 32, 8, 14336, 92544),
    "internlm2_20b": Shape("internlm2", 6144, 48, 48, 8, 16384, 92544),
    "internlm3_8b": Shape("internlm3", 4096, 48, 32, 2, 10240, 128512, head_dim=128),
    "llama_7b": Shape("llama", 4096, 32, 32, 32, 11008, 32000),
    "llama_13b": Shape("llama", 5120, 40, 40, 40, 13824, 32000),
    "llama2_70b": Shape("llama", 8192, 80, 64, 8, 28672, 32000),
    "llama3_8b": Shape("llama", 4096, 32, 32, 8, 14336, 128256),
    "llama3_70b": Shape("llama", 8192, 80, 64, 8, 28672, 128256),
    "llama3_2_1b": Shape("llama", 2048, 16, 32, 8, 8192, 128256, tied=True),
    "llama3_2_3b": Shape("llama", 3072, 28, 24, 8, 8192, 128256, tied=True),
    "minicpm_1b": Shape("minicpm", 1536, 52, 24, 8, 3840, 73440, tied=True),
    "minicpm_2b": Shape("minicpm", 2304, 40, 36, 36, 5760, 122753, tied=True),
    "mistral_7b": Shape("mistral", 4096, 32, 32, 8, 14336, 32000),
    "mistral_7b_v0_3": Shape("mistral", 4096, 32, 32, 8, 14336, 32768),
    "mistral_nemo_12b": Shape("mistral", 5120, 40, 32, 8, 14336, 131072, head_dim=128),
    "mistral_small_24b": Shape("mistral", 5120, 40, 32, 8, 32768, 131072, head_dim=128),
    "mixtral_8x7b": Shape("mixtral", 4096, 32, 32, 8, 14336, 32000, num_billions=46.7),
    "phi3_mini": Shape("phi3", 3072, 32, 32, 32, 8192, 32064),
    "phi4": Shape("phi3", 5120, 40, 40, 10, 17920, 100352),
    "phi4_mini": Shape("phi3", 3072, 32, 24, 8, 8192, 200064, tied=True),
    "qwen_1_8b": Shape("qwen", 2048, 24, 16, 16, 5504, 151936),
    "qwen_7b": Shape("qwen", 4096, 32, 32, 32, 11008, 151936),
    "qwen_72b": Shape("qwen", 8192, 80, 64, 64, 24576, 152064),
    "qwen1_5_0_5b": Shape("qwen2", 1024, 24, 16, 16, 2816, 151936, tied=True),
    "qwen1_5_1_8b": Shape("qwen2", 2048, 24, 16, 16, 5504, 151936),
    "qwen1_5_4b": Shape("qwen2", 2560, 40, 20, 20, 6912, 151936),
    "qwen1_5_7b": Shape("qwen2", 4096, 32, 32, 32, 11008, 151936),
    "qwen1_5_14b": Shape("qwen2", 5120, 40, 40, 40, 13696, 152064),
    "qwen1_5_72b": Shape("qwen2", 8192, 80, 64, 64, 24576, 152064),
    "qwen1_5_110b": Shape("qwen2", 8192, 80, 64, 8, 49152, 152064),
    "qwen1_5_moe_a2_7b": Shape("qwen2_moe", 2048, 24, 16, 16, 5632, 151936, num_billions=14.3),
    "qwen2_5_0_5b": Shape("qwen2", 896, 24, 14, 2, 4864, 151936, tied=True),
    "qwen2_5_1_5b": Shape("qwen2", 1536, 28, 12, 2, 8960, 151936, tied=True),
    "qwen2_5_1_5b_untied": Shape("qwen2", 1536, 28, 12, 2, 8960, 151936),
    "qwen2_5_3b": Shape("qwen2", 2048, 36, 16, 2, 11008, 151936, tied=True),
    "qwen2_5_7b": Shape("qwen2", 3584, 28, 28, 4, 18944, 152064),
    "qwen2_5_14b": Shape("qwen2", 5120, 48, 40, 8, 13824, 152064),
    "qwen2_5_32b": Shape("qwen2", 5120, 64, 40, 8, 27648, 152064),
    "qwen2_5_72b": Shape("qwen2", 8192, 80, 64, 8, 29568, 152064),
    "qwen3_0_6b": Shape("qwen3", 1024, 28, 16, 8, 3072, 151936, tied=True, head_dim=128),
    "qwen3_1_7b": Shape("qwen3", 2048, 28, 16, 8, 6144, 151936, tied=True, head_dim=128),
    "qwen3_4b": Shape("qwen3", 2560, 36, 32, 8, 9728, 151936, tied=True, head_dim=128),
    "qwen3_8b": Shape("qwen3", 4096, 36, 32, 8, 12288, 151936, head_dim=128),
    "qwen3_14b": Shape("qwen3", 5120, 40, 40, 8, 17408, 151936, head_dim=128),
    "qwen3_32b": Shape("qwen3", 5120, 64, 64, 8, 25600, 151936, head_dim=128),
    "starcoder": Shape("gpt_bigcode", 6144, 40, 48, 1, 24576, 49152, tied=True),
    "yi_6b": Shape("llama", 4096, 32, 32, 4, 11008, 64000),
    "yi_34b": Shape("llama", 7168, 60, 56, 8, 20480, 64000),
}

# name, Hugging Face id, ModelScope id ("" where it is the same), shape, prompt template, longest sequence
_LINES: tuple[tuple[str, str, str, str, str, int], ...] = (
    # XTuner 0.1.23
    ("baichuan_7b", "baichuan-inc/Baichuan-7B", "baichuan-inc/baichuan-7B", "baichuan_7b", "default", 4096),
    ("baichuan_13b_base", "baichuan-inc/Baichuan-13B-Base", "", "baichuan_13b", "default", 4096),
    ("baichuan_13b_chat", "baichuan-inc/Baichuan-13B-Chat", "", "baichuan_13b", "baichuan_chat", 4096),
    ("baichuan2_7b_base", "baichuan-inc/Baichuan2-7B-Base", "", "baichuan2_7b", "default", 4096),
    ("baichuan2_7b_chat", "baichuan-inc/Baichuan2-7B-Chat", "", "baichuan2_7b", "baichuan2_chat", 4096),
    ("baichuan2_13b_base", "baichuan-inc/Baichuan2-13B-Base", "", "baichuan2_13b", "default", 4096),
    ("baichuan2_13b_chat", "baichuan-inc/Baichuan2-13B-Chat", "", "baichuan2_13b", "baichuan2_chat", 4096),
    ("chatglm2_6b", "THUDM/chatglm2-6b", "ZhipuAI/chatglm2-6b", "chatglm_6b", "chatglm2", 32768),
    ("chatglm3_6b", "THUDM/chatglm3-6b", "ZhipuAI/chatglm3-6b", "chatglm_6b", "chatglm3", 8192),
    ("chatglm3_6b_base", "THUDM/chatglm3-6b-base", "ZhipuAI/chatglm3-6b-base", "chatglm_6b", "chatglm3", 32768),
    ("cohere_100b", "CohereForAI/c4ai-command-r-plus", "AI-ModelScope/c4ai-command-r-plus", "command_r_plus",
     "cohere_chat", 131072),
    ("deepseek_coder_6_7b_base", "deepseek-ai/deepseek-coder-6.7b-base", "", "deepseek_coder_6_7b", "deepseek_coder",
     16384),
    ("deepseekcoder_6_7b_instruct", "deepseek-ai/deepseek-coder-6.7b-instruct", "", "deepseek_coder_6_7b",
     "deepseek_coder", 16384),
    ("deepseek_moe_16b_base", "deepseek-ai/deepseek-moe-16b-base", "", "deepseek_moe_16b", "deepseek_moe", 4096),
    ("deepseek_moe_16b_chat", "deepseek-ai/deepseek-moe-16b-chat", "", "deepseek_moe_16b", "deepseek_moe", 4096),
    ("deepseek_v2_chat", "deepseek-ai/DeepSeek-V2-Chat", "", "deepseek_v2", "deepseek_v2", 131072),
    ("deepseek_v2_lite_chat", "deepseek-ai/DeepSeek-V2-Lite-Chat", "", "deepseek_v2_lite", "deepseek_v2", 32768),
    ("gemma_2b", "google/gemma-2b", "AI-ModelScope/gemma-2b", "gemma_2b", "default", 8192),
    ("gemma_2b_it", "google/gemma-2b-it", "AI-ModelScope/gemma-2b-it", "gemma_2b", "gemma", 8192),
    ("gemma_7b", "google/gemma-7b", "AI-ModelScope/gemma-7b", "gemma_7b", "default", 8192),
    ("gemma_7b_it", "google/gemma-7b-it", "AI-ModelScope/gemma-7b-it", "gemma_7b", "gemma", 8192),
    ("internlm_7b", "internlm/internlm-7b", "Shanghai_AI_Laboratory/internlm-7b", "internlm_7b", "default", 2048),
    ("internlm_chat_7b", "internlm/internlm-chat-7b", "Shanghai_AI_Laboratory/internlm-chat-7b", "internlm_7b",
     "internlm_chat", 2048),
    ("internlm_20b", "internlm/internlm-20b", "Shanghai_AI_Laboratory/internlm-20b", "internlm_20b", "default", 4096),
    ("internlm_chat_20b", "internlm/internlm-chat-20b", "Shanghai_AI_Laboratory/internlm-chat-20b", "internlm_20b",
     "internlm_chat", 4096),
    ("internlm2_1_8b", "internlm/internlm2-1_8b", "Shanghai_AI_Laboratory/internlm2-1_8b", "internlm2_1_8b",
     "default", 32768),
    ("internlm2_chat_1_8b", "internlm/internlm2-chat-1_8b", "Shanghai_AI_Laboratory/internlm2-chat-1_8b",
     "internlm2_1_8b", "internlm2_chat", 32768),
    ("internlm2_chat_1_8b_sft", "internlm/internlm2-chat-1_8b-sft", "Shanghai_AI_Laboratory/internlm2-chat-1_8b-sft",
     "internlm2_1_8b", "internlm2_chat", 32768),
    ("internlm2_7b", "internlm/internlm2-7b", "Shanghai_AI_Laboratory/internlm2-7b", "internlm2_7b", "default", 32768),
    ("internlm2_chat_7b", "internlm/internlm2-chat-7b", "Shanghai_AI_Laboratory/internlm2-chat-7b", "internlm2_7b",
     "internlm2_chat", 32768),
    ("internlm2_chat_7b_sft", "internlm/internlm2-chat-7b-sft", "Shanghai_AI_Laboratory/internlm2-chat-7b-sft",
     "internlm2_7b", "internlm2_chat", 32768),
    ("internlm2_20b", "internlm/internlm2-20b", "Shanghai_AI_Laboratory/internlm2-20b", "internlm2_20b", "default",
     32768),
    ("internlm2_chat_20b", "internlm/internlm2-chat-20b", "Shanghai_AI_Laboratory/internlm2-chat-20b",
     "internlm2_20b", "internlm2_chat", 32768),
    ("internlm2_5_chat_7b", "internlm/internlm2_5-7b-chat", "Shanghai_AI_Laboratory/internlm2_5-7b-chat",
     "internlm2_7b", "internlm2_chat", 32768),
    ("llama_7b", "huggyllama/llama-7b", "skyline2006/llama-7b", "llama_7b", "default", 2048),
    ("llama2_7b", "meta-llama/Llama-2-7b-hf", "modelscope/Llama-2-7b-ms", "llama_7b", "llama2_chat", 4096),
    ("llama2_7b_chat", "meta-llama/Llama-2-7b-chat-hf", "modelscope/Llama-2-7b-chat-ms", "llama_7b", "llama2_chat",
     4096),
    ("llama2_70b", "meta-llama/Llama-2-70b-hf", "modelscope/Llama-2-70b-ms", "llama2_70b", "llama2_chat", 4096),
    ("llama3_8b", "meta-llama/Meta-Llama-3-8B", "LLM-Research/Meta-Llama-3-8B", "llama3_8b", "llama3_chat", 8192),
    ("llama3_8b_instruct", "meta-llama/Meta-Llama-3-8B-Instruct", "LLM-Research/Meta-Llama-3-8B-Instruct",
     "llama3_8b", "llama3_chat", 8192),
    ("llama3_70b_instruct", "meta-llama/Meta-Llama-3-70B-Instruct", "LLM-Research/Meta-Llama-3-70B-Instruct",
     "llama3_70b", "llama3_chat", 8192),
    ("minicpm_1b", "openbmb/MiniCPM-1B-sft-bf16", "OpenBMB/MiniCPM-1B-sft-bf16", "minicpm_1b", "minicpm", 4096),
    ("minicpm_2b", "openbmb/MiniCPM-2B-sft-bf16", "OpenBMB/MiniCPM-2B-sft-bf16", "minicpm_2b", "minicpm", 4096),
    ("mistral_7b", "mistralai/Mistral-7B-v0.1", "AI-ModelScope/Mistral-7B-v0.1", "mistral_7b", "mistral", 32768),
    ("mixtral_8x7b", "mistralai/Mixtral-8x7B-v0.1", "AI-ModelScope/Mixtral-8x7B-v0.1", "mixtral_8x7b", "mixtral",
     32768),
    ("mixtral_8x7b_instruct", "mistralai/Mixtral-8x7B-Instruct-v0.1", "AI-ModelScope/Mixtral-8x7B-Instruct-v0.1",
     "mixtral_8x7b", "mixtral", 32768),
    ("phi3_mini_4k_instruct", "microsoft/Phi-3-mini-4k-instruct", "LLM-Research/Phi-3-mini-4k-instruct", "phi3_mini",
     "phi3_chat", 4096),
    ("phi3_mini_128k_instruct", "microsoft/Phi-3-mini-128k-instruct", "LLM-Research/Phi-3-mini-128k-instruct",
     "phi3_mini", "phi3_chat", 131072),
    ("qwen_1_8b", "Qwen/Qwen-1_8B", "", "qwen_1_8b", "default", 8192),
    ("qwen_1_8b_chat", "Qwen/Qwen-1_8B-Chat", "", "qwen_1_8b", "qwen_chat", 8192),
    ("qwen_7b", "Qwen/Qwen-7B", "", "qwen_7b", "default", 8192),
    ("qwen_7b_chat", "Qwen/Qwen-7B-Chat", "", "qwen_7b", "qwen_chat", 8192),
    ("qwen_72b", "Qwen/Qwen-72B", "", "qwen_72b", "default", 32768),
    *((f"qwen1_5_{size}", f"Qwen/Qwen1.5-{name}", "", f"qwen1_5_{size}", "default", 32768) for size, name in (
        ("0_5b", "0.5B"), ("1_8b", "1.8B"), ("4b", "4B"), ("7b", "7B"), ("14b", "14B"), ("72b", "72B"),
        ("110b", "110B"),
    )),
    *((f"qwen1_5_{size}_chat", f"Qwen/Qwen1.5-{name}-Chat", "", f"qwen1_5_{size}", "qwen_chat", 32768)
      for size, name in (
        ("0_5b", "0.5B"), ("1_8b", "1.8B"), ("4b", "4B"), ("7b", "7B"), ("14b", "14B"), ("72b", "72B"),
        ("110b", "110B"),
    )),
    ("qwen1_5_moe_a2_7_b_chat", "Qwen/Qwen1.5-MoE-A2.7B-Chat", "", "qwen1_5_moe_a2_7b", "qwen_chat", 8192),
    ("starcoder", "bigcode/starcoder", "AI-ModelScope/starcoder", "starcoder", "default", 8192),
    ("vicuna_7b_v15", "lmsys/vicuna-7b-v1.5", "AI-ModelScope/vicuna-7b-v1.5", "llama_7b", "vicuna", 4096),
    ("vicuna_13b_v15", "lmsys/vicuna-13b-v1.5", "AI-ModelScope/vicuna-13b-v1.5", "llama_13b", "vicuna", 4096),
    ("yi_6b", "01-ai/Yi-6B", "01ai/Yi-6B", "yi_6b", "default", 4096),
    ("yi_34b", "01-ai/Yi-34B", "01ai/Yi-34B", "yi_34b", "default", 4096),
    ("yi_34b_200k", "01-ai/Yi-34B-200K", "01ai/Yi-34B-200K", "yi_34b", "llama2_chat", 200000),
    ("zephyr_7b_beta", "HuggingFaceH4/zephyr-7b-beta", "modelscope/zephyr-7b-beta", "mistral_7b", "zephyr", 32768),
    # newer ones: an instruction model is written as its own tokenizer says
    *((f"qwen2_5_{size}_instruct", f"Qwen/Qwen2.5-{name}-Instruct", "", f"qwen2_5_{size}", "", 32768)
      for size, name in (
        ("0_5b", "0.5B"), ("1_5b", "1.5B"), ("3b", "3B"), ("7b", "7B"), ("14b", "14B"), ("32b", "32B"),
        ("72b", "72B"),
    )),
    *((f"qwen2_5_{size}", f"Qwen/Qwen2.5-{name}", "", f"qwen2_5_{size}", "qwen_chat", 32768) for size, name in (
        ("0_5b", "0.5B"), ("1_5b", "1.5B"), ("3b", "3B"), ("7b", "7B"), ("14b", "14B"),
    )),
    *((f"qwen3_{size}", f"Qwen/Qwen3-{name}", "", f"qwen3_{size}", "", 32768) for size, name in (
        ("0_6b", "0.6B"), ("1_7b", "1.7B"), ("4b", "4B"), ("8b", "8B"), ("14b", "14B"), ("32b", "32B"),
    )),
    ("llama3_1_8b", "meta-llama/Llama-3.1-8B", "LLM-Research/Meta-Llama-3.1-8B", "llama3_8b", "llama3_chat", 131072),
    ("llama3_1_8b_instruct", "meta-llama/Llama-3.1-8B-Instruct", "LLM-Research/Meta-Llama-3.1-8B-Instruct",
     "llama3_8b", "", 131072),
    ("llama3_1_70b_instruct", "meta-llama/Llama-3.1-70B-Instruct", "LLM-Research/Meta-Llama-3.1-70B-Instruct",
     "llama3_70b", "", 131072),
    ("llama3_2_1b_instruct", "meta-llama/Llama-3.2-1B-Instruct", "LLM-Research/Llama-3.2-1B-Instruct", "llama3_2_1b",
     "", 131072),
    ("llama3_2_3b_instruct", "meta-llama/Llama-3.2-3B-Instruct", "LLM-Research/Llama-3.2-3B-Instruct", "llama3_2_3b",
     "", 131072),
    ("llama3_3_70b_instruct", "meta-llama/Llama-3.3-70B-Instruct", "LLM-Research/Llama-3.3-70B-Instruct",
     "llama3_70b", "", 131072),
    *((f"gemma2_{size}_it", f"google/gemma-2-{size}-it", f"LLM-Research/gemma-2-{size}-it", f"gemma2_{size}", "",
       8192) for size in ("2b", "9b", "27b")),
    ("gemma3_1b_it", "google/gemma-3-1b-it", "LLM-Research/gemma-3-1b-it", "gemma3_1b", "", 32768),
    *((f"gemma3_{size}_it", f"google/gemma-3-{size}-it", f"LLM-Research/gemma-3-{size}-it", f"gemma3_{size}", "",
       131072) for size in ("4b", "12b", "27b")),
    ("phi3_5_mini_instruct", "microsoft/Phi-3.5-mini-instruct", "LLM-Research/Phi-3.5-mini-instruct", "phi3_mini", "",
     131072),
    ("phi4", "microsoft/phi-4", "LLM-Research/phi-4", "phi4", "", 16384),
    ("phi4_mini_instruct", "microsoft/Phi-4-mini-instruct", "LLM-Research/Phi-4-mini-instruct", "phi4_mini", "",
     131072),
    ("mistral_7b_instruct_v0_3", "mistralai/Mistral-7B-Instruct-v0.3", "LLM-Research/Mistral-7B-Instruct-v0.3",
     "mistral_7b_v0_3", "", 32768),
    ("mistral_nemo_12b_instruct", "mistralai/Mistral-Nemo-Instruct-2407", "LLM-Research/Mistral-Nemo-Instruct-2407",
     "mistral_nemo_12b", "", 131072),
    ("mistral_small_24b_instruct", "mistralai/Mistral-Small-24B-Instruct-2501",
     "mistralai/Mistral-Small-24B-Instruct-2501", "mistral_small_24b", "", 32768),
    ("internlm2_5_chat_1_8b", "internlm/internlm2_5-1_8b-chat", "Shanghai_AI_Laboratory/internlm2_5-1_8b-chat",
     "internlm2_1_8b", "internlm2_chat", 32768),
    ("internlm2_5_chat_20b", "internlm/internlm2_5-20b-chat", "Shanghai_AI_Laboratory/internlm2_5-20b-chat",
     "internlm2_20b", "internlm2_chat", 32768),
    ("internlm3_8b_instruct", "internlm/internlm3-8b-instruct", "Shanghai_AI_Laboratory/internlm3-8b-instruct",
     "internlm3_8b", "", 32768),
    ("deepseek_llm_7b_chat", "deepseek-ai/deepseek-llm-7b-chat", "", "deepseek_llm_7b", "", 4096),
    ("deepseek_r1_distill_qwen_1_5b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "", "qwen2_5_1_5b_untied", "",
     131072),
    ("deepseek_r1_distill_qwen_7b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "", "qwen2_5_7b", "", 131072),
    ("deepseek_r1_distill_llama_8b", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "", "llama3_8b", "", 131072),
    ("deepseek_r1_distill_qwen_14b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", "", "qwen2_5_14b", "", 131072),
)  # fmt: skip

MODELS = {
    key: KnownModel(key, hub_id, modelscope_id or hub_id, SHAPES[shape], template, context)
    for key, hub_id, modelscope_id, shape, template, context in _LINES
}
BY_ID = {each: model for model in MODELS.values() for each in (model.modelscope_id, model.hub_id)}
