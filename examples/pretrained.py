"""A pretrained model, and the MuSe setting to try on it: what some examples share."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

import numpy as np
import torch
from command_line import UsageError, option
from corpus import Corpus, pack, tokenize
from models import muse_layers, without_dropout
from plugin import muse_hf
from safetensors import SafetensorError
from small_model import make_small_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from muse_hf.models import InputError, check_length, check_uses_muse, is_encoder
from muse_hf.routing import UnsupportedError, check_family, model_policy

# For the small model, whose contexts are short.
SMALL_MUSE = {
    "local_block": 128,
    "cluster_size": 8,
    "num_retrieved": 32,
    "retrieval_threshold": 0.0,
    "min_length": 0,
}


@dataclass
class LoadArguments:
    _argument_group_name = "Model"

    model: str | None = option(
        None, "A causal model, a folder or a name on the Hub. Left out: a small one is made first."
    )
    tokenizer: str | None = option(None, "Its tokenizer, if it comes without one.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "Precision of the model's weights (default: bfloat16, on a CPU float32)."
    )
    device: str | None = option(None, "Such as cuda or cpu (default: cuda where there is one).")


@dataclass
class PretrainedArguments(LoadArguments):
    _argument_group_name = "Model and MuSe attention"

    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision of the model's weights.")
    layers: str | None = option(
        None,
        "Layers that use MuSe: all, numbers such as 2,3, or auto, which measures on text of its own and "
        "gives every layer the fastest setting that keeps the model within --max_loss_increase (default: the "
        "model's own policy, or all).",
    )
    max_loss_increase: float = option(0.002, "Budget of --layers auto, relative to the loss.")
    num_retrieved: int | None = option(None, "Clusters each query attends to exactly, at most.")
    retrieval_threshold: float | None = option(
        None,
        "Retrieve only clusters whose summary misses at least this share of a query's attention; 0: all.",
    )
    cluster_size: int | None = option(None, "Mean number of keys in a cluster.")
    local_block: int | None = option(None, "Tokens attended exactly around each token.")
    min_length: int | None = option(
        None, "Shorter sequences are attended exactly, by default on a GPU those for which that is faster."
    )


def load_model(
    arguments: LoadArguments, corpus: Corpus, length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that is named, or the small one, with exact attention and without dropout, on its device.

    Args:
        corpus: What the small model is made from.
        length: The longest input it is to have.
    """
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.model is None:
        model, tokenizer = make_small_model(corpus)
        return model.to(device), tokenizer
    try:
        check_family(config := AutoConfig.from_pretrained(arguments.model))
        if is_encoder(config):
            raise UsageError(f"{arguments.model!r} is an encoder, which does not predict the next token.")
        check_length(config, length)
        without_dropout(config)
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or arguments.model)
        dtype = arguments.dtype or ("float32" if device == "cpu" else "bfloat16")
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, config=config, dtype=dtype, attn_implementation="sdpa"
        )
        return model.to(device).eval(), tokenizer
    except (UnsupportedError, InputError) as error:
        raise UsageError(f"{str(error).rstrip('.')}.") from error
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"the model {arguments.model!r} could not be opened ({reason}).") from error


def unseen_texts(arguments: LoadArguments, corpus: Corpus) -> Iterator[str]:
    """Held-out documents and, of a model that was not made from them, all others after these."""
    others = () if arguments.model is None else corpus.texts(held_out=False)
    return chain(corpus.texts(held_out=True), others)


def text_rows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int, needed: int
) -> torch.Tensor:
    """At most `count` rows (rows, length) of tokens of documents in order, each ended by end-of-text.

    Raises:
        UsageError: There are fewer than `needed`.
    """
    end = tokenizer.eos_token_id
    windows = pack(tokenize(texts, tokenizer), 0 if end is None else end, length)
    rows = list(islice(windows, count))
    if len(rows) < needed:
        raise UsageError(
            f"the text fills {len(rows)} rows of {length} tokens, but {needed} are needed: give more text."
        )
    return torch.from_numpy(np.stack(rows)).long()


def muse_policy(
    arguments: PretrainedArguments, model: PreTrainedModel, calibration: torch.Tensor, length: int
) -> muse_hf.MuseConfig:
    """What MuSe means: the model's own policy or a default one, changed by the arguments.

    Args:
        calibration: Tokens (rows, length) for `--layers auto`.
        length: Tokens of the longest input, to which MuSe has to make a difference.
    """
    fields = ("num_retrieved", "retrieval_threshold", "cluster_size", "local_block", "min_length")
    given = {name: value for name in fields if (value := getattr(arguments, name)) is not None}
    layers, options = arguments.layers, {}
    if layers == "auto":
        options = {"calibration": calibration, "max_loss_increase": arguments.max_loss_increase}
    elif layers is not None:
        layers = muse_layers(layers)
    try:
        default = muse_hf.MuseConfig(**SMALL_MUSE) if arguments.model is None else model_policy(model.config)
        report = muse_hf.patch_model(model, layers, default.replace(**given), **options)
        check_uses_muse(model, model_policy(model.config), length)
    except ValueError as error:
        raise UsageError(f"{str(error).rstrip('.')}.") from error
    print(f"{report}\n")
    policy = model_policy(model.config)
    muse_hf.unpatch_model(model)
    return policy


def use_attention(model: torch.nn.Module, policy: muse_hf.MuseConfig | None) -> None:
    """Let a model, also inside a PEFT or parallel wrapper, attend by a policy, or exactly."""
    if policy is None:
        muse_hf.unpatch_model(model)
    else:
        muse_hf.patch_model(model, config=policy)
