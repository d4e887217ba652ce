"""From arguments to a model, to its MuSe setting, and to what its optimizer decays."""

from collections.abc import Iterator
from typing import Any

import torch
from command_line import UsageError
from pretrain_arguments import SHAPES, ModelArguments, MuseArguments
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# MuSe for the 2048 tokens of the default job: far blocks of 256, 512 and 1024 tokens, on a GPU too.
SMALL_MUSE = {
    "local_block": 256,
    "hierarchy": "dyadic",
    "cluster_size": 16,
    "num_retrieved": 16,
    "retrieval_threshold": 0.0,
    "min_length": 0,
}
DROPOUTS = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "embd_pdrop",
    "hidden_dropout_prob",
    "resid_pdrop",
)


def model_config(
    arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, context_length: int
) -> PretrainedConfig:
    """The configuration of the model to train, without dropout, which MuSe has none of."""
    if arguments.checkpoint is None:
        config = config_from_shape(arguments, tokenizer, context_length)
    else:
        config = config_from_checkpoint(arguments.checkpoint, len(tokenizer), context_length)
    without_dropout(config)
    return config


def without_dropout(config: PretrainedConfig) -> None:
    """Turn off all dropout: MuSe serves none of attention, and two attentions are to see the same."""
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)


def config_from_shape(
    arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, context_length: int
) -> PretrainedConfig:
    """The configuration of a named shape, some numbers of which may be replaced."""
    shape = SHAPES[arguments.shape]
    width = arguments.hidden_size or shape.width
    heads = arguments.num_heads or shape.heads
    kv_heads = arguments.num_kv_heads or max(1, shape.kv_heads * heads // shape.heads)
    if width % heads or heads % kv_heads:
        raise UsageError(
            f"--hidden_size ({width}) must be a multiple of --num_heads ({heads}), and --num_heads of "
            f"--num_kv_heads ({kv_heads})."
        )
    common = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "hidden_size": width,
        "num_hidden_layers": arguments.num_layers or shape.layers,
        "num_attention_heads": heads,
        "max_position_embeddings": context_length,
        "tie_word_embeddings": True,
        # Keeps activations at their size; the usual 0.02 does so at width 2500 and slows small models down.
        "initializer_range": width**-0.5,
    }
    if shape.family == "llama":
        common |= {"num_key_value_heads": kv_heads, "intermediate_size": shape.mlp * width // shape.width}
    elif kv_heads != heads:
        raise UsageError("GPT-2 has a key/value head for every head: leave out --num_kv_heads.")
    return AutoConfig.for_model(shape.family, **common)


def config_from_checkpoint(checkpoint: str, vocab_size: int, context_length: int) -> PretrainedConfig:
    """The configuration of a checkpoint, if it suits the tokenizer and the context."""
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise UsageError(f"no model could be opened at {checkpoint!r}.") from error
    if vocab_size > config.vocab_size:
        raise UsageError(
            f"the tokenizer has {vocab_size} tokens, the model {checkpoint!r} only {config.vocab_size}."
        )
    if config.model_type == "gpt2" and context_length > config.n_positions:
        raise UsageError(
            f"the model {checkpoint!r} has learned {config.n_positions} positions, fewer than a "
            f"--context_length of {context_length}."
        )
    vars(config).pop(
        "muse", None
    )  # the setting of a MuSe model; this run's own, if any, comes by `set_attention`
    return config


def build_model(checkpoint: str | None, config: PretrainedConfig) -> PreTrainedModel:
    """A float32 model with exact attention: random weights, or those of `checkpoint`."""
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    if checkpoint is None:
        model = AutoModelForCausalLM.from_config(config, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, **options)
    model.loss_type = "ForCausalLM"  # Transformers cannot tell from the name GPT2LMHeadModel, and warns
    return model


def check_model(config: PretrainedConfig, layers: str, muse_config: Any, compiled: bool) -> None:
    """Try without weights whether a model can be trained, so that nothing has to be trained to find out.

    Raises:
        UsageError: It does not work here, looks at later tokens, or has a layer that MuSe does not support.
    """
    try:
        with torch.device("meta"):
            model = build_model(None, config)
        set_attention(model, layers, muse_config, compiled)
    except ValueError as error:
        reason = str(error).split("\n")[0].split(". ")[0].rstrip(".")
        raise UsageError(f"this model cannot be trained: {reason}.") from error
    if not all(getattr(module, "is_causal", True) for module in model.modules()):
        raise UsageError(f"a {config.model_type!r} model attends to later tokens, which it is to predict.")


def muse_settings(arguments: MuseArguments) -> Any:
    """The `muse_hf.MuseConfig` that the arguments ask for."""
    import muse_hf

    return arguments.apply(muse_hf.MuseConfig(**SMALL_MUSE))


def muse_layers(text: str) -> str | list[int]:
    """`"all"`, `"central"`, or the numbers in a list such as `"2,3"`."""
    if text in ("all", "central"):
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UsageError(f"--layers {text!r} must be all, central, or layer numbers such as 2,3.") from None


def set_attention(model: PreTrainedModel, layers: str, muse_config: Any, compiled: bool) -> None:
    """Replace exact attention in the layers that --layers names, if there is a setting of MuSe.

    A model that is to be compiled attends exactly as layers without MuSe do beside others: outside the graph.
    Inside, Transformers masks causal attention by a tensor of context_length x context_length, with which the
    fast kernels do not serve.
    """
    import muse_hf

    if muse_config is not None:
        muse_hf.patch_model(model, layers=muse_layers(layers), config=muse_config)
    elif compiled:
        muse_hf.patch_model(model, layers=[])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's groups: decay for matrices, none for embeddings, biases and norms."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}

    def chosen(decayed: bool) -> Iterator[nn.Parameter]:
        for parameter in model.parameters():
            if (parameter.ndim >= 2 and id(parameter) not in embeddings) == decayed:
                yield parameter

    return [
        {"params": list(chosen(True)), "weight_decay": weight_decay},
        {"params": list(chosen(False)), "weight_decay": 0.0},
    ]
