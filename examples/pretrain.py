"""Pretrain a GPT-2 or Llama model with exact or MuSe attention, on Accelerate.

Without arguments it trains a small Llama twice on the same batches, with exact and with MuSe attention, on
the source text of Python's own standard library, and compares the losses. That needs no download and no GPU,
and takes about three minutes on two cores.

    python examples/pretrain.py
    python examples/pretrain.py --text my_folder --file_pattern "*.txt" --shape gpt2-tiny --attention muse

PG-19 (books), streamed from the Hub, one GPU, 16k context, MuSe in the central layer:

    python examples/pretrain.py --dataset_name emozilla/pg19 --streaming --shape llama-27m \\
        --vocab_size 8192 --context_length 16384 --batch_size 1 --gradient_accumulation_steps 4 \\
        --steps 5000 --learning_rate 1e-3 --warmup_steps 200 --eval_every 250 --checkpoint_every 500 \\
        --layers central --local_block 1024 --hierarchy flat --cluster_size 32 --num_retrieved 32 \\
        --mixed_precision bf16 --compare --output_dir runs/pg19

The paper's model and setting at 16k; arguments that are given replace those of the preset:

    python examples/pretrain.py --preset gpt-30m-16k --text my_folder --output_dir runs/gpt-30m-16k

Several processes: accelerate launch --num_processes 8 examples/pretrain.py ...
After an interruption: python examples/pretrain.py --resume --output_dir runs/pg19
"""

import hashlib
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    set_seed,
    tqdm,
)
from checkpoints import resume_or_start, save_checkpoint, writing
from command_line import UsageError, next_free
from corpus import (
    Corpus,
    file_corpus,
    held_out_windows,
    named_corpus,
    train_tokenizer,
    training_windows,
)
from losses import check_chunked_loss, use_chunked_loss
from models import build_model, check_model, model_config, muse_settings, parameter_groups, use_muse
from pretrain_arguments import Arguments, DataArguments, RunArguments, parse_arguments
from records import DivergedError, Progress, Recorder, read_json, write_json
from report import plot_losses, summarize, summary_text
from texts import files_of
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

DEFAULT_FOLDER = Path("runs/pretrain")


@dataclass
class Job:
    """What the trainings of a run have in common."""

    arguments: Arguments
    folder: Path
    config: PretrainedConfig
    muse_config: Any
    tokenizer: PreTrainedTokenizerBase
    windows: datasets.Dataset | datasets.IterableDataset
    held_out: datasets.Dataset
    tokens_per_step: int


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    folder = None
    try:
        arguments = parse_arguments(argv, description=__doc__)
        folder = run_folder(arguments.run)
        pretrain(arguments, folder)
    except (UsageError, DivergedError) as error:
        print(f"\npretrain.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        print(f"\npretrain.py: error: {error}; {way_on(folder)}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\npretrain.py: interrupted; {way_on(folder)}.", file=sys.stderr)
        return 130
    return 0


def way_on(folder: Path | None) -> str:
    """How to go on with a run that has ended early."""
    if folder and (folder / "config.json").exists():
        return f"go on with --resume --output_dir {shlex.quote(str(folder))}"
    return "there is nothing to resume yet"


def pretrain(arguments: Arguments, folder: Path) -> None:
    """Train with each attention that is asked for, then report."""
    run = arguments.run
    transformers.utils.logging.disable_progress_bar()
    # Weights that are saved once because they are tied are no news at every checkpoint.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    accelerator = make_accelerator(run, folder)
    job = prepare(arguments, accelerator, folder)
    results = {}
    for attention in run.attentions:
        result = folder / attention / "result.json"
        if not result.exists():
            train(job, accelerator, attention)
        results[attention] = read_json(result)
    if accelerator.is_main_process:
        plot_losses(folder, run.attentions, folder / "losses.png")
        summary = summarize(results, "losses.png")
        write_json(folder / "summary.json", summary)
        print("\n" + summary_text(summary, folder, arguments.data.context_length))
    accelerator.end_training()


def run_folder(run: RunArguments) -> Path:
    """The folder of the run, which exists only if the run is resumed, and in which files can be made."""
    folder = Path(run.output_dir) if run.resume else new_folder(run.output_dir)
    try:
        path = folder.absolute()
        while not path.exists():
            path = path.parent
        # Under a name of its own and gone at once: other processes do the same, and later checks may fail.
        tempfile.TemporaryDirectory(dir=path).cleanup()
    except OSError as error:
        raise UsageError(f"nothing can be written to {str(folder)!r} ({error.strerror}).") from error
    return folder


def new_folder(output_dir: str | None) -> Path:
    """A path where nothing exists yet, or nothing that may be seen, which `run_folder` finds out."""
    if output_dir is None:
        return next_free(DEFAULT_FOLDER)
    if os.path.exists(Path(output_dir)):  # as a path, because "" is the current folder too
        raise UsageError(
            f"{output_dir!r} exists already and is not overwritten; choose another --output_dir, or continue "
            "that run with --resume."
        )
    return Path(output_dir)


def make_accelerator(run: RunArguments, folder: Path) -> Accelerator:
    """The Accelerator that launches, accumulates, clips, logs and saves."""
    accelerator = Accelerator(
        # The next batch is copied while the GPU computes.
        dataloader_config=DataLoaderConfiguration(non_blocking=torch.cuda.is_available()),
        mixed_precision=run.mixed_precision,
        # A step is always the mean of the same number of windows, also across the end of an epoch.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=run.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        step_scheduler_with_optimizer=False,  # else the schedule would run once per process and step
        log_with="tensorboard",
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "tensorboard")),
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate would train in float32 without a word.
        raise UsageError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no.")
    return accelerator


def prepare(arguments: Arguments, accelerator: Accelerator, folder: Path) -> Job:
    """Read the data and check all that can be checked, and only then create the run's folder."""
    model, data, run = arguments.model, arguments.data, arguments.run
    corpus = load_corpus(data)
    datasets.disable_progress_bars()  # tokenising has a bar of its own
    tokenizer = load_tokenizer(arguments, corpus, folder / "tokenizer")
    prompt = len(prompt_tokens(tokenizer, run.prompt))
    if not 0 < prompt < data.context_length:
        raise UsageError(
            f"--prompt has {prompt} tokens, but must have at least one and fewer than --context_length "
            f"({data.context_length})."
        )
    config = model_config(model, tokenizer, data.context_length)
    muse_config = muse_settings(arguments.muse) if "muse" in run.attentions else None
    check_model(config, arguments.muse.layers, muse_config)
    if run.loss_chunk is not None:
        check_chunked_loss(config)
    if muse_config and data.context_length <= muse_config.local_block:
        accelerator.print(
            f"Note: a window of {data.context_length} tokens is not longer than local_block "
            f"({muse_config.local_block}), so that MuSe attends exactly."
        )
    batch = run.batch_size * accelerator.num_processes
    windows_per_step = batch * run.gradient_accumulation_steps
    needed = run.steps * windows_per_step
    windows = training_windows(corpus, tokenizer, data.context_length, needed, data.streaming)
    if not data.streaming and len(windows) < batch:
        raise UsageError(f"the training text fills {len(windows)} windows, fewer than one batch of {batch}.")
    held_out = held_out_windows(corpus, tokenizer, data.context_length, data.held_out_windows)
    # Workers are forked, and a process with threads of the tokenizer forks with a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not data.streaming:
        tokens, held_out_tokens = (len(part) * data.context_length for part in (windows, held_out))
        accelerator.print(
            f"{tokens:,} tokens of training text, of which the run makes {needed / len(windows):.2f} passes; "
            f"{held_out_tokens:,} tokens are held out."
        )
    tokens_per_step = windows_per_step * data.context_length
    job = Job(arguments, folder, config, muse_config, tokenizer, windows, held_out, tokens_per_step)
    record_settings(job, accelerator)
    return job


def load_corpus(data: DataArguments) -> Corpus:
    """The documents that the arguments name."""
    if data.dataset_name is None:
        return file_corpus(files_of(data), data.held_out_every)
    return named_corpus(
        data.dataset_name,
        data.dataset_config,
        data.dataset_split,
        data.streaming,
        data.text_column,
        data.held_out_every,
    )


def load_tokenizer(arguments: Arguments, corpus: Corpus, saved: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a resumed run, else the one that is given, else a newly trained BPE."""
    data = arguments.data
    name = str(saved) if saved.exists() else data.tokenizer or arguments.model.checkpoint
    if name is None:
        return train_tokenizer(corpus.texts(held_out=False), data.vocab_size, data.tokenizer_characters)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageError(f"no tokenizer could be opened at {name!r}.") from error
    if len(tokenizer) < 2:  # Transformers makes up an empty one where a folder has a model only
        raise UsageError(f"there is no tokenizer at {name!r}; name another one with --tokenizer.")
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer {name!r} has no end-of-text token to put between documents.")
    return tokenizer


def record_settings(job: Job, accelerator: Accelerator) -> None:
    """Create the folder and save what the run is, or check that a resumed run still is what it was."""
    settings = {
        "arguments": job.arguments.values(),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "held_out_windows": len(job.held_out),
        "held_out_sha256": hashlib.sha256(job.held_out[:]["input_ids"].numpy().tobytes()).hexdigest(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, datasets)},
    }
    path = job.folder / "config.json"
    if path.exists():
        saved = read_json(path)
        for name, meaning in (
            ("processes", "the number of processes"),
            ("mixed_precision", "the mixed precision"),
            ("held_out_sha256", "the text"),
        ):
            if settings[name] != saved.get(name):
                raise UsageError(f"the run in {str(job.folder)!r} cannot be resumed: {meaning} has changed.")
        return
    accelerator.wait_for_everyone()  # all processes have looked for a free folder before one creates it
    if accelerator.is_main_process:
        job.folder.mkdir(parents=True)
        job.tokenizer.save_pretrained(job.folder / "tokenizer")
        write_json(path, settings)  # last: with this file the run can be resumed
    accelerator.wait_for_everyone()


def train(job: Job, accelerator: Accelerator, attention: str) -> None:
    """Train one model and write its losses, checkpoints, final weights and result.json."""
    run = job.arguments.run
    folder = job.folder / attention
    set_seed(run.seed)
    model = build_model(job.arguments.model.checkpoint, job.config)
    if attention == "muse":
        use_muse(model, job.arguments.muse.layers, job.muse_config)
    if run.loss_chunk is not None:
        use_chunked_loss(model, run.loss_chunk)
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if run.compile:
        model.compile()  # in place: the names of the weights stay
    optimizer = torch.optim.AdamW(
        parameter_groups(model, run.weight_decay),
        lr=run.learning_rate,
        betas=(0.9, 0.95),
        fused=accelerator.device.type == "cuda",  # one kernel for all weights
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, run.warmup_steps, run.steps)
    held_out = DataLoader(job.held_out, batch_size=1, pin_memory=torch.cuda.is_available())
    model, optimizer, scheduler, held_out = accelerator.prepare(model, optimizer, scheduler, held_out)
    progress = resume_or_start(accelerator, folder)
    recorder = Recorder(accelerator, folder, progress, run.steps, job.tokens_per_step)
    monitor = training_monitor(job, accelerator) if attention == "muse" else None
    if monitor and progress.step == 0:
        recorder.write_measurement(monitor.measure(model))
        recorder.restart_clock()

    model.train()
    batch_losses = []
    for input_ids in training_batches(job, accelerator, progress):
        with accelerator.accumulate(model):
            loss = model(input_ids=input_ids, labels=input_ids).loss
            batch_losses.append(loss.detach())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), run.max_grad_norm)
                if isinstance(norm, DTensor):  # FSDP2: the norm of this process's part
                    norm = norm.full_tensor()
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        progress.step += 1
        recorder.add(torch.stack(batch_losses).mean(), norm, learning_rate)
        batch_losses.clear()

        last = progress.step == run.steps
        evaluate = last or progress.step % run.eval_every == 0
        checkpoint = progress.step % run.checkpoint_every == 0 and not last
        measure = monitor is not None and monitor.due(progress.step)
        if evaluate or checkpoint or measure or progress.step % run.log_every == 0:
            recorder.write()
        if measure:
            recorder.write_measurement(monitor.measure(model))
        if evaluate:
            recorder.write_held_out(held_out_loss(accelerator, model, held_out))
        if checkpoint:
            save_checkpoint(accelerator, folder, progress, run.keep_checkpoints)
        if evaluate or checkpoint or measure:
            recorder.restart_clock()
        if last:
            break
    recorder.close()
    save_result(job, accelerator, model, folder, progress, recorder.held_out_loss)
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def training_monitor(job: Job, accelerator: Accelerator) -> Any:
    """The `muse_hf.TrainingMonitor` of a run, or None where there is nothing to measure."""
    from muse_hf import TrainingMonitor
    from muse_hf.routing import shortest_length

    config = job.muse_config
    shortest = max(config.local_block + 1, shortest_length(config, accelerator.device))
    if job.arguments.run.monitor_every == 0 or job.arguments.data.context_length < shortest:
        return None
    if not accelerator.is_main_process:
        transformers.utils.logging.set_verbosity_error()  # one process warns for all
    return TrainingMonitor(job.held_out[:1], job.arguments.run.monitor_every)


def training_batches(job: Job, accelerator: Accelerator, progress: Progress) -> Iterator[torch.Tensor]:
    """Batches (batch_size, context_length) without end, from where `progress` stands, which it moves on.

    The order of an epoch follows from the seed and the epoch's number alone, so that a resumed run and a run
    with another attention see the same batches.
    """
    run, data = job.arguments.run, job.arguments.data
    order = {"buffer_size": data.shuffle_buffer} if data.streaming else {"keep_in_memory": True}
    workers = min(data.num_workers, 1) if data.streaming else data.num_workers  # a stream has one reader
    options = {"batch_size": run.batch_size, "num_workers": workers, "pin_memory": torch.cuda.is_available()}
    while True:
        windows = job.windows.shuffle(seed=run.seed + progress.epoch, **order)
        loader = accelerator.prepare(DataLoader(windows, drop_last=True, **options))
        for batch in skip_first_batches(loader, progress.batch):
            progress.batch += 1
            yield batch["input_ids"]
        if progress.batch == 0:
            raise UsageError(f"the training text fills fewer windows than one batch of {run.batch_size}.")
        progress.epoch, progress.batch = progress.epoch + 1, 0


@torch.no_grad()
def held_out_loss(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> float:
    """Mean loss in nats per token over the held-out windows, one of which is a batch."""
    model.eval()
    losses = []
    for batch in tqdm(loader, desc="held-out loss", leave=False, unit="window", delay=2):
        loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        losses.append(accelerator.gather_for_metrics(loss.reshape(1)))
    model.train()
    return torch.cat(losses).mean().item()


def save_result(
    job: Job,
    accelerator: Accelerator,
    model: torch.nn.Module,
    folder: Path,
    progress: Progress,
    held_out_loss: float,
) -> None:
    """Save the model with its tokenizer and, last, what was measured: the mark of a finished training."""
    weights = accelerator.get_state_dict(model)  # all processes together, each of which may hold a part
    if not accelerator.is_main_process:
        return
    with writing("the model"):
        accelerator.unwrap_model(model).save_pretrained(folder / "model", state_dict=weights)
        job.tokenizer.save_pretrained(folder / "model")
    tokens = progress.step * job.tokens_per_step
    result = {
        "held_out_loss": held_out_loss,
        "held_out_tokens": len(job.held_out) * job.arguments.data.context_length,
        "steps": progress.step,
        "tokens": tokens,
        "seconds": progress.seconds,
        "seconds_per_step": progress.seconds / progress.step,
        "tokens_per_second": tokens / progress.seconds,
        "model": f"{folder.name}/model",  # in the folder of the run, which may move
        "sample": sample_text(job, folder / "model", accelerator.device),
    }
    write_json(folder / "result.json", result)


@torch.no_grad()
def sample_text(job: Job, saved: Path, device: torch.device) -> str:
    """Text that the saved model continues from the prompt within one window, drawn with the run's seed."""
    run = job.arguments.run
    set_seed(run.seed)
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).to(device)
    prompt = torch.tensor([prompt_tokens(job.tokenizer, run.prompt)], device=model.device)
    tokens = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=min(run.sample_tokens, job.arguments.data.context_length - prompt.shape[1]),
        do_sample=True,
        temperature=0.8,
        pad_token_id=job.tokenizer.eos_token_id,
    )
    return job.tokenizer.decode(tokens[0], skip_special_tokens=True)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens of the prompt, without special ones."""
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]


if __name__ == "__main__":
    sys.exit(main())
