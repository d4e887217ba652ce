"""A small Llama for trying things out, made in about a minute on a CPU: it writes like its text and copies.

Language models look far back above all to copy: an induction head finds where the current token occurred
before and repeats what followed. Training takes long to find that, so this model starts with it: layer 0
writes the code of the previous token beside the code of each token, layer 1 looks for the current token's
code among the previous ones and copies the token there to the output. Training then learns the rest.
"""

import torch
from accelerate.utils import set_seed, tqdm
from command_line import UsageError
from corpus import Corpus, tokenize, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, WIDTH, HEAD = 320, 128, 64
CODE, PREVIOUS, COPIED, FREE = (slice(start, start + 32) for start in range(0, WIDTH, 32))
ROPE_THETA = 1e8  # such that half of the frequencies hardly turn over thousands of tokens
NEAR, FAR = slice(0, 12), slice(16, 32)  # frequencies to tell neighbours apart, and to ignore positions
STEPS, ROWS, LENGTH, CHARACTERS = 240, 4, 512, 1_000_000
LEARNING_RATE = 3e-3


def make_small_model(corpus: Corpus) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train the model, and its tokenizer, on the training documents of a corpus."""
    texts, characters = [], 0
    for text in corpus.texts(held_out=False):
        texts.append(text)
        if (characters := characters + len(text)) >= CHARACTERS:
            break
    tokenizer = train_tokenizer(texts, VOCABULARY, CHARACTERS)
    tokens = torch.tensor([token for document in tokenize(texts, tokenizer) for token in document])
    if len(tokens) <= LENGTH:
        raise UsageError(f"the training documents have {len(tokens)} tokens, too few to train on.")
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=WIDTH // HEAD,
            intermediate_size=2 * WIDTH,
            max_position_embeddings=8192,
            initializer_range=0.05,
            attention_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    start_with_induction(model)
    train(model, tokens)
    return model.eval(), tokenizer


@torch.no_grad()
def start_with_induction(model: LlamaForCausalLM) -> None:
    """Set the weights of head 0 of both layers, and what they read and write."""
    vocabulary = model.config.vocab_size
    codes = torch.randint(0, 2, (vocabulary, 32)).float() * 2 - 1
    embeddings = model.model.embed_tokens.weight.zero_()
    embeddings[:, CODE] = codes
    embeddings[:, FREE] = torch.randn(vocabulary, 32)
    model.lm_head.weight[:, COPIED] = codes / 4

    identity = torch.eye(32)
    before, match = (layer.self_attn for layer in model.model.layers)
    for attention, target in ((before, PREVIOUS), (match, COPIED)):
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[:HEAD] = 0
        attention.o_proj.weight[:, :HEAD] = 0
        attention.v_proj.weight[:32, CODE] = identity
        attention.o_proj.weight[target, :32] = identity

    # Constant queries and keys, a turn of one position apart: the logit is largest one token back.
    turn = ROPE_THETA ** -(torch.arange(32) / 32)[NEAR]
    before.k_proj.bias[NEAR] = 8.0
    before.q_proj.bias[NEAR] = 8.0 * turn.cos()
    before.q_proj.bias[32 + NEAR.start : 32 + NEAR.stop] = -8.0 * turn.sin()
    far = torch.cat([torch.arange(32)[FAR], 32 + torch.arange(32)[FAR]])
    match.q_proj.weight[far, CODE] = 2.5 * identity
    match.k_proj.weight[far, PREVIOUS] = 2.5 * identity


def train(model: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    """Train on windows of the tokens, one row in each batch being random tokens that repeat."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)
    bar = tqdm(range(STEPS), desc="Making a small model", unit="step")
    for _ in bar:
        starts = torch.randint(len(tokens) - LENGTH, (ROWS,))
        input_ids = torch.stack([tokens[start : start + LENGTH] for start in starts])
        period = int(torch.randint(LENGTH // 8, LENGTH // 2, ()))
        repeats = torch.randint(model.config.vocab_size, (period,)).repeat(LENGTH // period + 1)
        input_ids[0] = repeats[:LENGTH]
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        bar.set_postfix_str(f"loss {loss.item():.2f}")
