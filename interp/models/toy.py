"""Which small models have a mechanism that is known? Random ones of each architecture, and hand-built ones.

The random ones are parity oracles: every method must give on them what the slow obvious way gives.
The hand-built ones have planted mechanisms, so a method's answer can be right or wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from interp.models.load import load
from interp.models.model import Model, Weights

_N_VOCAB = 64


def _gpt2(c: Any) -> Any:
    return c.GPT2Config(
        n_layer=3, n_head=4, n_embd=32, n_inner=48, vocab_size=_N_VOCAB, n_positions=64, bos_token_id=0, eos_token_id=1
    )


def _shared(**extra: Any) -> dict[str, Any]:
    sizes = {
        "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48,
        "vocab_size": _N_VOCAB, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 1,
    }  # fmt: skip
    return sizes | extra


_CONFIGS: dict[str, Callable[[Any], Any]] = {
    "gpt2": _gpt2,
    "llama": lambda c: c.LlamaConfig(**_shared(num_key_value_heads=2, tie_word_embeddings=True)),
    "gpt_neox": lambda c: c.GPTNeoXConfig(**_shared(use_parallel_residual=True, rotary_pct=0.5)),
    "gemma": lambda c: c.GemmaConfig(**_shared(num_key_value_heads=1, head_dim=16)),
    "mistral": lambda c: c.MistralConfig(**_shared(num_key_value_heads=2, sliding_window=8)),
    "qwen2": lambda c: c.Qwen2Config(**_shared(num_key_value_heads=2)),
    "opt": lambda c: c.OPTConfig(
        num_hidden_layers=3, num_attention_heads=4, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48,
        vocab_size=_N_VOCAB, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    ),
    "qwen3": lambda c: c.Qwen3Config(**_shared(num_key_value_heads=2, head_dim=8)),
    "phi": lambda c: c.PhiConfig(**_shared(partial_rotary_factor=0.5)),
    "gemma2": lambda c: c.Gemma2Config(
        **_shared(num_key_value_heads=2, head_dim=8, sliding_window=8, query_pre_attn_scalar=16)
    ),
}  # fmt: skip

#: Architectures that `random` can build, one for each way in which decoders commonly differ.
ARCHITECTURES = ("gpt2", "llama", "gpt_neox", "gemma", "mistral", "qwen2", "opt")
#: Others that it can build: norms on queries and keys; one norm for attention and MLP; norms after both and soft caps.
VARIANTS = ("qwen3", "phi", "gemma2")


def random_module(architecture: str = "llama", *, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """A random Hugging Face module with 3 layers, 4 query heads, d_model 32, 64 tokens and a context of 64.

    Args:
        architecture: one of `ARCHITECTURES`: gpt2 (learned positions, LayerNorm), llama and qwen2 (grouped-query
            attention, rotary), gpt_neox (parallel attention and MLP, partly rotary), gemma (one KV head, d_head of its
            own), mistral (sliding window of 8), opt (learned positions, ReLU); or of `VARIANTS`.
        seed: seed of the weights.
        scale: standard deviation of the weights; large enough that attention is far from uniform.

    Returns:
        The module, in float32, evaluation mode. The global random state is left as it was.
    """
    import transformers

    if architecture not in _CONFIGS:
        raise ValueError(f"architecture {architecture!r} is not known; use one of {', '.join(_CONFIGS)}.")
    config = _CONFIGS[architecture](transformers)
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator
        module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Norm weights stay near their neutral value, 0 for Gemma (which adds 1) and 1 for the others.
            centre = 1.0 if parameter.ndim == 1 and "norm" in name or ".ln_" in name and "weight" in name else 0.0
            centre = 0.0 if architecture.startswith("gemma") or name.endswith("bias") else centre
            parameter.copy_(centre + noise * (scale if parameter.ndim > 1 else 0.1))
    return module.eval()


def random(architecture: str = "llama", *, seed: int = 0, weights: Weights = "processed", scale: float = 0.3) -> Model:
    """A random tiny model: `random_module`, loaded.

    Args:
        architecture: one of `ARCHITECTURES` or `VARIANTS`.
        seed: seed of the weights.
        weights: "processed" or "raw".
        scale: standard deviation of the weights.

    Returns:
        The Model, with `tokenizer()`.

    Example:
        >>> random("llama").n_key_value_heads
        2
    """
    return load(random_module(architecture, seed=seed, scale=scale), tokenizer=tokenizer(), weights=weights)


def random_tokens(model: Model, n: int, length: int, *, seed: int = 0) -> Tensor:
    """Token ids drawn uniformly, special tokens left out.

    Args:
        model: for its vocabulary and device.
        n: number of prompts.
        length: tokens a prompt.
        seed: seed of the draw.

    Returns:
        `[n length]`.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, model.d_vocab, (n, length), generator=generator).to(model.device)


def tokenizer(n_vocab: int = _N_VOCAB) -> Any:
    """A tokenizer of whole words: "<bos>", "<eos>", "w2", "w3", ... separated by spaces.

    Args:
        n_vocab: size of the vocabulary.

    Returns:
        A Hugging Face fast tokenizer; it adds no special tokens of its own accord.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<bos>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, n_vocab)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", unk_token="<eos>"
    )


def inflated(*, layer: int = 1, feature: int = 3, token: int = 0, value: float = 5000.0, seed: int = 0) -> Model:
    """A random 3-layer GPT-2 in which one MLP neuron writes one massive activation.

    Dimension 0 of the stream is set by the position embedding at position `token` alone. One neuron of the MLP of
    `layer` reads it and writes `value` to dimension `feature`. All else is small: the largest other entry stays below
    100. Weights are raw: centring would spread the entry over all dimensions.

    Args:
        layer: 0 to 2, the layer whose output has the entry first.
        feature: 1 to 31.
        token: 0 to 63, the position that carries it.
        value: its size, to within 2% (the neuron also reads the small random entries).
        seed: seed of the other weights.

    Returns:
        The Model. The neuron is number 0 of its layer.
    """
    module: Any = random_module("gpt2", seed=seed, scale=0.02)
    with torch.no_grad():
        module.transformer.wte.weight[:, 0] = 0.0
        module.transformer.wpe.weight[:, 0] = 0.0
        module.transformer.wpe.weight[token, 0] = 10.0
        for block in module.transformer.h:
            for write in (block.attn.c_proj, block.mlp.c_proj):
                write.weight[:, 0] = 0.0
                write.bias[0] = 0.0
            for norm in (block.ln_1, block.ln_2):
                norm.weight.fill_(1.0)
                norm.bias.fill_(0.0)
        mlp = module.transformer.h[layer].mlp
        # After LayerNorm the marked position has about sqrt(32) in dimension 0 and the others about 0:
        # a gain of 10 and a bias of -25 put the neuron at about +30 there and far below zero elsewhere.
        mlp.c_fc.weight[:, 0] = 0.0
        mlp.c_fc.weight[0, 0] = 10.0
        mlp.c_fc.bias[0] = -25.0
        marked = nn.functional.layer_norm(10.0 * torch.eye(32)[0], (32,))[0]
        mlp.c_proj.weight[0] = 0.0
        mlp.c_proj.weight[0, feature] = value / (10.0 * marked - 25.0)
    return load(module, tokenizer=tokenizer(), weights="raw")


def induction(*, n_words: int = 12, context: int = 24, sharpness: float = 60.0) -> Model:
    """A hand-built 2-layer GPT-2 that copies what followed the last occurrence of the current token.

    Layer 0 head 0 attends to the previous position and copies its token into a "previous token" subspace (the
    previous-token head). Layer 1 head 0 looks for positions whose previous token is the current one, and copies their
    token to the output subspace (the induction head). Both other heads and both MLPs write nothing. The stream has the
    subspaces token, position, previous token and output, each one-hot.

    Args:
        n_words: size of the vocabulary (two of them special).
        context: longest prompt.
        sharpness: scale of the attention scores of a match.

    Returns:
        The Model, raw weights. On a repeated random sequence it is right from the second repeat on.
    """
    import transformers

    width = 3 * n_words + context
    width += width % 2
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=width, n_inner=4, vocab_size=n_words, n_positions=context, bos_token_id=0,
        eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        module: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    d_head = width // 2
    if d_head < max(context, n_words):
        raise ValueError(f"context={context} and n_words={n_words} leave a head too narrow ({d_head}): raise n_words.")
    token, position = slice(0, n_words), slice(n_words, n_words + context)
    previous = slice(n_words + context, 2 * n_words + context)
    output = slice(2 * n_words + context, 3 * n_words + context)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        module.transformer.wte.weight[:, token] = torch.eye(n_words)
        module.transformer.wpe.weight[:, position] = torch.eye(context)
        first, second = (block.attn for block in module.transformer.h)
        # LayerNorm makes a one-hot entry about sqrt(width/2) or sqrt(width/3): scores are scaled to `sharpness`.
        gain = (sharpness * d_head**0.5 / (width / 3)) ** 0.5
        shift = torch.diag(torch.ones(context - 1), -1)  # position p asks for the key of position p-1
        _set_head(first, d_head, position, position, token, previous, gain * shift, gain * torch.eye(context), n_words)
        eye = gain * torch.eye(n_words)
        _set_head(second, d_head, token, previous, token, output, eye, eye, n_words)
        # The first position has only itself to attend to, so it passes for its own successor: no query may want it.
        second.c_attn.weight[position.start, width : width + n_words] = -gain
        module.lm_head.weight[:, output] = 10.0 * torch.eye(n_words)
    return load(module.eval(), tokenizer=tokenizer(n_words), weights="raw")


def _set_head(
    attention: Any, d_head: int, query: slice, key: slice, value: slice, out: slice, w_q: Tensor, w_k: Tensor, n: int
) -> None:
    # GPT-2 keeps q, k and v side by side as [d_model, 3 d_model]; head 0 owns the first d_head columns of each.
    width = 2 * d_head
    attention.c_attn.weight[query, : w_q.shape[1]] = w_q
    attention.c_attn.weight[key, width : width + w_k.shape[1]] = w_k
    attention.c_attn.weight[value, 2 * width : 2 * width + n] = torch.eye(n)
    attention.c_proj.weight[:n, out] = 1.0 / (width / 3) ** 0.5 * torch.eye(n)
