"""Tiny random models of every supported family, and what the tests of the adapter ask of them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from muse_hf import MuseConfig, patch_model

LAYERS, HEADS, KV_HEADS, HIDDEN, VOCABULARY = 3, 4, 2, 32, 99
LOCAL_BLOCK = 16
LONG, MEDIUM, SHORT = 70, 45, 12  # tokens: several blocks, some blocks, less than a block

MUSE = MuseConfig(local_block=LOCAL_BLOCK, cluster_size=4, num_retrieved=2, retrieval_threshold=0.0)
EVERYTHING = MUSE.replace(num_retrieved=1000)  # all keys are retrieved, so that MuSe is exact

_SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,  # larger than usual, so that attention is far from uniform
}
_ROTARY = _SIZES | {"num_key_value_heads": KV_HEADS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 128,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = _SIZES | {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}

_FAMILIES = {
    "bert": (BertModel, BertConfig, _BERT),
    "gpt2": (GPT2LMHeadModel, GPT2Config, _GPT2),
    "llama": (LlamaForCausalLM, LlamaConfig, _ROTARY),
    "mistral": (MistralForCausalLM, MistralConfig, _ROTARY | {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _ROTARY),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, _ROTARY | {"head_dim": 8}),
}
FAMILIES = tuple(_FAMILIES)
CAUSAL_FAMILIES = tuple(family for family in FAMILIES if family != "bert")


def tiny_model(family: str, attention: str = "sdpa", **options) -> PreTrainedModel:
    """A random model in float64 and in evaluation mode, the same one for the same arguments.

    Double precision, so that "equal to rounding" is told apart from an approximation.
    """
    model_class, config_class, defaults = _FAMILIES[family]
    torch.manual_seed(0)
    model = model_class._from_config(config_class(**(defaults | options)), attn_implementation=attention)
    return model.double().eval()


def tokens(length: int, rows: int = 1, seed: int = 1) -> torch.Tensor:
    """Random token ids (rows, length) without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def muse_model(
    family: str, config: MuseConfig = MUSE, layers: str | list[int] | None = None, **options
) -> PreTrainedModel:
    """`tiny_model`, patched."""
    model = tiny_model(family, **options)
    patch_model(model, layers=layers, config=config)
    return model


def output_of(model: torch.nn.Module, input_ids: torch.Tensor, **inputs) -> torch.Tensor:
    """Logits, or the last hidden states of BERT, without gradients."""
    with torch.no_grad():
        return model(input_ids=input_ids, **inputs)[0]


def pad_batch(sequences: list[torch.Tensor], sides: str | list[str]) -> tuple[dict[str, torch.Tensor], list]:
    """Sequences (1, n) in one batch padded on "left" or "right", and where each one lies in it.

    Args:
        sides: For all rows, or one a row.

    Returns:
        The model's inputs (ids, mask and positions), and one (row, slice of tokens) a sequence.
    """
    sides = [sides] * len(sequences) if isinstance(sides, str) else sides
    width = max(sequence.shape[1] for sequence in sequences)
    input_ids = torch.ones(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    places = []
    for row, (sequence, side) in enumerate(zip(sequences, sides)):
        length = sequence.shape[1]
        start = width - length if side == "left" else 0
        place = (row, slice(start, start + length))
        input_ids[place] = sequence[0]
        mask[place] = 1
        places.append(place)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}, places


def pack(sequences: list[torch.Tensor]) -> tuple[dict[str, torch.Tensor], list]:
    """Sequences (1, n) in one row, with positions that restart, and the (row, slice) of each one."""
    lengths = [sequence.shape[1] for sequence in sequences]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    places = [(0, slice(end - length, end)) for end, length in zip(ends, lengths)]
    return {"input_ids": torch.cat(sequences, dim=1), "position_ids": positions}, places


def assert_same(actual: torch.Tensor, expected: torch.Tensor, what: str, atol: float = 1e-5) -> None:
    """Equal to rounding. Norms and rotary embeddings compute in float32 even in a float64 model."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=lambda text: f"{what}: {text}")


def assert_different(actual: torch.Tensor, expected: torch.Tensor, what: str, least: float = 1e-3) -> None:
    """Different by more than any rounding."""
    difference = (actual - expected).abs().max().item()
    assert difference > least, f"{what}: the largest difference is {difference:.2e}"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for every byte, and `<|endoftext|>`; 257 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
