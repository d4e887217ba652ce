"""What evaluate_long_context.py asks of a model. Each task is one forward pass of one row of tokens.

Answers are read off the forward pass over prompt and answer together: a token counts as right if it is the
most probable one there. That needs one prefill and no generation, and gives a loss besides.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from texts import with_answer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The passkey of Mohtashami and Jaggi (2023): text that says nothing, around a sentence that does.
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "\nThe pass key is {key}. Remember it.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
COPIED_TOKENS = 32


@dataclass(frozen=True)
class Task:
    """A prompt with its answer.

    Attributes:
        name: `"passkey"` (in filler), `"needle"` (in real text) or `"copying"` (random tokens, repeated).
        length: Tokens of prompt and answer.
        depth: Where in the prompt the answer is said, 0 at its start and 1 at its end.
        input_ids: (1, length).
        answer: How many tokens at the end of `input_ids` are the answer.
    """

    name: str
    length: int
    depth: float
    input_ids: torch.Tensor
    answer: int


def make_tasks(
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    text: list[int],
    lengths: list[int],
    depths: int,
    samples: int,
) -> Iterator[Task]:
    """Tasks of all kinds, lengths and depths, the same for every model and attention.

    Args:
        vocabulary: Tokens to copy are drawn from so many.
        text: Tokens of real text, at least as many as the longest length.
    """
    filler = _tokens(tokenizer, FILLER)
    filler *= max(lengths) // len(filler) + 1
    for length in lengths:
        for sample in range(samples):
            generator = random.Random(1000 * length + sample)
            start = generator.randrange(len(text) - length + 1)
            real = text[start : start + length]
            for step in range(depths):
                depth = step / max(1, depths - 1)
                key = "".join(generator.sample("0123456789", 6))
                for name, haystack in (("passkey", filler), ("needle", real)):
                    yield _retrieval(tokenizer, name, haystack, key, length, depth)
            copied = [generator.randrange(vocabulary) for _ in range(COPIED_TOKENS)]
            input_ids = copied + real[: length - 2 * COPIED_TOKENS] + copied
            yield Task("copying", length, 0.0, torch.tensor([input_ids]), COPIED_TOKENS - 1)


def _retrieval(tokenizer, name, haystack, key, length, depth) -> Task:
    needle = _tokens(tokenizer, NEEDLE.format(key=key))
    question, answer = with_answer(tokenizer, QUESTION, key)
    around = length - len(needle) - len(question) - len(answer)
    place = round(depth * around)
    input_ids = haystack[:place] + needle + haystack[place:around] + question + answer
    return Task(name, length, depth, torch.tensor([input_ids]), len(answer))


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def score(model: PreTrainedModel, task: Task) -> tuple[float, float]:
    """Share of the answer's tokens that are right, and their mean loss in nats."""
    input_ids = task.input_ids.to(model.device)
    logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=task.answer + 1).logits[0, :-1]
    answer = input_ids[0, -task.answer :]
    loss = torch.nn.functional.cross_entropy(logits.float(), answer)
    return (logits.argmax(-1) == answer).float().mean().item(), loss.item()


@torch.no_grad()
def prefill(model: PreTrainedModel, input_ids: torch.Tensor) -> tuple[float, float | None]:
    """Seconds of a forward pass that fills the cache, the better of two, and its peak GPU memory in GiB."""
    on_gpu = model.device.type == "cuda"
    input_ids = input_ids.to(model.device)
    seconds = []
    for _ in range(3):  # the first one compiles and warms up
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model(input_ids=input_ids, use_cache=True, logits_to_keep=1)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]), torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None


@torch.no_grad()
def continuation(model: PreTrainedModel, input_ids: torch.Tensor, new_tokens: int) -> list[int]:
    """The tokens that `generate` puts after the prompt, the most probable one each time."""
    input_ids = input_ids.to(model.device)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, input_ids.shape[1] :].tolist()
