"""Adapt a pretrained model to MuSe attention with LoRA (PEFT), on Accelerate, and see what gap remains.

The same training is done twice, with exact and with MuSe attention, on the same batches, and what comes of
either is evaluated with both: that says what MuSe costs before and after, and whether what is left of the gap
comes from training with the approximation or from evaluating with it. Without arguments it makes a small
model from Python's standard library and takes about two minutes on two cores.

    python examples/finetune_lora.py --model path/to/model --text my_folder --length 32768 --steps 200 \\
        --mixed_precision bf16 --layers all

Or fine-tune on a task and compare the scores: the share of test rows whose whole answer is the most probable.

    python examples/finetune_lora.py --model meta-llama/Llama-3.2-1B --task_dataset google/boolq \\
        --prompt "{passage} Question: {question}? Answer:" --answer "{answer}" --local_block 128
    python examples/finetune_lora.py --model meta-llama/Llama-3.2-1B --task_dataset rajpurkar/squad \\
        --prompt "{context} Question: {question} Answer:" --answer "{answers[text][0]}" --local_block 128
    python examples/finetune_lora.py --model path/to/model --task_file rows.jsonl   # fields: prompt, answer

Text no longer than local_block is attended exactly, so only longer prompts make a difference.
Several processes: accelerate launch --num_processes 8 examples/finetune_lora.py ...

Each adapted model is saved with its tokenizer, so that `muse-hf evaluate runs/finetune/muse` opens what
--full trained. Beside an adapter, in the folder `model`, is the config of its model, which says the layers
that use MuSe:

    import muse_hf
    config = AutoConfig.from_pretrained("runs/finetune/muse/model")
    model = AutoModelForCausalLM.from_pretrained("path/to/model", config=config)
    model = PeftModel.from_pretrained(model, "runs/finetune/muse")
    model.merge_and_unload().save_pretrained("merged")  # one model, for what does not know adapters
    AutoTokenizer.from_pretrained("runs/finetune/muse").save_pretrained("merged")

(PEFT loads the adapter: what `AutoModelForCausalLM.from_pretrained("runs/finetune/muse")` does for adapters
leaves those of GPT-2 at their random start before Transformers 5.6.)
"""

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed, tqdm
from command_line import UsageError, exit_code, make_parser, next_free, option, parse
from corpus import Corpus, read_files, text_files
from finetune_data import Example, TaskArguments, task_examples, text_examples
from peft import LoraConfig, PeftModel, get_peft_model
from plugin import muse_hf
from pretrain_arguments import TextArguments
from pretrained import PretrainedArguments, load_model, muse_policy, text_rows, use_attention
from records import write_json
from report import NAMES
from texts import load_texts
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from muse_hf.models import transformers_model

# What is evaluated, each with both attentions: the keys of the results, and their titles.
ROWS = {"before": "before training"} | {
    f"trained_with_{attention}": f"trained with {name}" for attention, name in NAMES.items()
}


@dataclass
class FinetuneArguments:
    _argument_group_name = "Fine-tuning"

    length: int = option(1024, "Tokens in a window of text; longest prompt and answer of a task.")
    steps: int = option(60, "Optimizer steps.")
    gradient_accumulation_steps: int = option(1, "Windows, or rows of a task, in one optimizer step.")
    learning_rate: float | None = option(
        None, "Highest learning rate, after warm-up (default: 2e-4, or 2e-5 with --full)."
    )
    rank: int = option(8, "Rank of the LoRA adapters, which all linear layers get.")
    full: bool = option(False, "Train all weights instead of adapters.")
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "Precision of the forward pass.")
    gradient_checkpointing: bool = option(False, "Less memory, more time.")
    test_text: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files and folders on which the loss is measured, none of them trained on. Left out: the "
            "held-out documents, one in 20 of the text."
        },
    )
    test_windows: int = option(4, "Windows of test text on which the loss is measured.")
    seed: int = option(0, "Seed of the adapters and of the order of the batches.")
    output_dir: str | None = option(
        None, "New folder for the results. Left out: runs/finetune, or the next free name."
    )


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return exit_code("finetune_lora.py", lambda: finetune(*parse_arguments(argv)))


def parse_arguments(
    argv: list[str] | None,
) -> tuple[FinetuneArguments, PretrainedArguments, TextArguments, TaskArguments]:
    """The arguments, if they make sense."""
    parser = make_parser(
        (PretrainedArguments, TextArguments, TaskArguments, FinetuneArguments), "finetune_lora.py", __doc__
    )
    pretrained, texts, task, arguments = parse(parser, argv)
    sources = (texts.text or texts.packages, texts.dataset_name, task.task_file, task.task_dataset)
    if sum(source is not None for source in sources) > 1:
        raise UsageError(
            "give one of --text (or --packages), --dataset_name, --task_file and --task_dataset."
        )
    if arguments.test_text and (task.task_file or task.task_dataset):
        raise UsageError("--test_text is for text; a task has test rows of its own.")
    for name in ("length", "steps", "gradient_accumulation_steps", "rank", "test_windows"):
        if getattr(arguments, name) < (smallest := 16 if name == "length" else 1):
            raise UsageError(f"--{name} must be at least {smallest}.")
    if arguments.output_dir and Path(arguments.output_dir).exists():
        raise UsageError(f"{arguments.output_dir!r} exists already and is not overwritten.")
    return arguments, pretrained, texts, task


def finetune(
    arguments: FinetuneArguments, pretrained: PretrainedArguments, texts: TextArguments, task: TaskArguments
) -> None:
    """Adapt with exact and with MuSe attention, evaluate either with both, and report."""
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        # A step is always the mean of the same number of rows, also across the end of the data.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=arguments.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        step_scheduler_with_optimizer=False,
        cpu=pretrained.device == "cpu",
    )
    pretrained = dataclasses.replace(pretrained, device=str(accelerator.device))
    folder = Path(arguments.output_dir) if arguments.output_dir else next_free(Path("runs/finetune"))
    corpus = load_texts(texts)
    model, tokenizer = load_model(pretrained, corpus, arguments.length)
    needed = arguments.steps * arguments.gradient_accumulation_steps * accelerator.num_processes
    train, test = train_and_test(arguments, task, corpus, tokenizer, needed)
    calibration = torch.cat([example.input_ids for example in train])[None, : arguments.length]
    longest = max(len(example.input_ids) for example in test)
    policy = muse_policy(pretrained, model, calibration, longest)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.mkdir(parents=True)
        if pretrained.model is None:
            save(model, tokenizer, folder / "base")
    accelerator.wait_for_everyone()
    if pretrained.model is None:
        pretrained = dataclasses.replace(pretrained, model=str(folder / "base"))

    policies = {"exact": None, "muse": policy}
    results: dict[str, dict[str, dict[str, float]]] = {row: {} for row in ROWS}
    for trained in NAMES:
        del model  # one at a time on the device
        accelerator.free_memory()
        model, _ = load_model(pretrained, corpus, arguments.length)
        use_attention(model, policies[trained])
        results["before"][f"evaluated_with_{trained}"] = measure(accelerator, model, test)
        model = adapt(arguments, accelerator, model, train, NAMES[trained])
        if accelerator.is_main_process:
            save(accelerator.unwrap_model(model), tokenizer, folder / trained)
        for evaluated in NAMES:
            use_attention(model, policies[evaluated])
            after = measure(accelerator, model, test)
            results[f"trained_with_{trained}"][f"evaluated_with_{evaluated}"] = after
    groups = (arguments, pretrained, texts, task)
    values = {name: value for group in groups for name, value in vars(group).items()}
    if accelerator.is_main_process:
        settings = {"arguments": values, "muse": policy.to_dict()}
        write_json(folder / "results.json", settings | {"results": results})
        print(report(results))
        print(f"\nadapted models: {folder / 'exact'}, {folder / 'muse'}")


def train_and_test(
    arguments: FinetuneArguments,
    task: TaskArguments,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    needed: int,
) -> tuple[list[Example], list[Example]]:
    """Examples of the task or else of text: at most `needed` to train on, and those to test on."""
    if task.task_file or task.task_dataset:
        return task_examples(task, tokenizer, arguments.length, needed)
    train = text_rows(corpus.texts(held_out=False), tokenizer, arguments.length, needed, needed=1)
    texts = test_texts(arguments.test_text, corpus)
    test = text_rows(texts, tokenizer, arguments.length, arguments.test_windows, needed=1)
    return text_examples(train), text_examples(test)


def test_texts(paths: list[str] | None, corpus: Corpus) -> Iterator[str]:
    """The texts on which the loss is measured: those of the paths, else the held-out ones."""
    if paths is None:
        texts = list(corpus.texts(held_out=True))
        if not texts:
            raise UsageError(
                f"fewer than {corpus.held_out_every} documents leave none to test on: name --test_text."
            )
        return iter(texts)
    return (document["text"] for document in read_files([str(file) for file in text_files(paths, "*")]))


def adapt(
    arguments: FinetuneArguments,
    accelerator: Accelerator,
    model: PreTrainedModel,
    train: list[Example],
    title: str,
) -> torch.nn.Module:
    """Train a model, or an adapter for it, and return it in its wrappers."""
    set_seed(arguments.seed)
    if not arguments.full:
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            target_modules="all-linear",
        )
        model = get_peft_model(model, lora)
    if arguments.gradient_checkpointing:
        transformers_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    rate = arguments.learning_rate or (2e-5 if arguments.full else 2e-4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=accelerator.device.type == "cuda")
    scheduler = get_cosine_schedule_with_warmup(optimizer, arguments.steps // 10, arguments.steps)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    model.train()
    bar = tqdm(total=arguments.steps, desc=title, unit="step")
    batches = endless_batches(accelerator, train, arguments.seed)
    for _ in range(arguments.steps * arguments.gradient_accumulation_steps):
        with accelerator.accumulate(model):
            loss = model(**next(batches), use_cache=False).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            scheduler.step()
            bar.update()
            bar.set_postfix_str(f"loss {loss.item():.4f}")
    bar.close()
    return model


def save(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model, or its adapter, with the tokenizer it was trained with."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if isinstance(model, PeftModel):
        # An adapter comes without a config, and beside one would no longer be taken for an adapter.
        transformers_model(model).config.save_pretrained(folder / "model")


def endless_batches(
    accelerator: Accelerator, train: list[Example], seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """One example after the other, in an order that depends on the seed alone."""
    loader = DataLoader(
        train,
        batch_size=1,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=lambda examples: {name: value[None] for name, value in vars(examples[0]).items()},
    )
    loader = accelerator.prepare(loader)
    while True:
        yield from loader


@torch.no_grad()
def measure(accelerator: Accelerator, model: torch.nn.Module, test: list[Example]) -> dict[str, float]:
    """Mean loss of the labels in nats per token, and of a task the share of answers that are right."""
    model.eval()
    losses, right = [], []
    for example in tqdm(test, desc="testing", unit="row", leave=False):
        input_ids = example.input_ids[None].to(accelerator.device)
        with accelerator.autocast():
            if len(example.answer) == len(example.labels):
                losses.append(muse_hf.token_losses(model, input_ids)[0])
                continue
            answer = example.answer.to(accelerator.device)
            logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=len(answer) + 1).logits
        logits = logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, answer, reduction="none"))
        right.append((logits.argmax(-1) == answer).all().float())
    score = {"score": torch.stack(right).mean().item()} if right else {}
    return {"loss": torch.cat(losses).double().mean().item()} | score


def report(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """A table of losses, and of a task one of scores: rows say what trained, columns what evaluates."""
    return "\n\n".join(table(results, name) for name in results["before"]["evaluated_with_exact"])


def table(results: dict[str, dict[str, dict[str, float]]], name: str) -> str:
    """The losses or the scores, and how far MuSe attention is from exact attention in each row."""
    rows = {
        ROWS[row]: [measured[f"evaluated_with_{attention}"][name] for attention in NAMES]
        for row, measured in results.items()
    }
    rows["each as it was trained"] = [
        results[f"trained_with_{attention}"][f"evaluated_with_{attention}"][name] for attention in NAMES
    ]
    number, last = (".4f", "MuSe relative to exact") if name == "loss" else (".1%", "MuSe minus exact")
    titles = "".join(f"{title:>17}" for title in NAMES.values())
    lines = [f"{name + ', evaluated with':30}{titles}{last:>25}"]
    for title, (exact, muse) in rows.items():
        gap = muse / exact - 1 if name == "loss" else muse - exact
        lines.append(f"{title:30}{exact:17{number}}{muse:17{number}}{gap:+25.2%}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
