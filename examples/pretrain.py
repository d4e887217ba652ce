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

The same beside exact attention and the default setting, on the source of installed packages:

    python examples/pretrain.py --preset gpt-30m-16k --packages torch transformers --file_pattern "*.py" \\
        --attention exact muse muse:setting=default:layers=all --output_dir runs/three

Several processes: accelerate launch --num_processes 8 examples/pretrain.py ...
After an interruption: python examples/pretrain.py --resume --output_dir runs/pg19
"""

import hashlib
import logging
import os
import platform
import shlex
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator, PartialState, skip_first_batches
from accelerate.utils import (
    DataLoaderConfiguration,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    ParallelismConfig,
    ProjectConfiguration,
    set_seed,
    tqdm,
)
from attentions import Attention, attentions
from checkpoints import resume_or_start, save_checkpoint
from command_line import UsageError, next_free
from corpus import (
    Corpus,
    file_corpus,
    held_out_windows,
    named_corpus,
    package_versions,
    train_tokenizer,
    training_windows,
)
from losses import check_chunked_loss, use_chunked_loss
from models import build_model, check_model, model_config, parameter_groups, set_attention
from plugin import muse_hf  # noqa: F401
from pretrain_arguments import Arguments, DataArguments, RunArguments, parse_arguments
from pretrain_report import compare, comparison_text, plot_losses
from records import DivergedError, PausedError, Progress, Recorder, read_json, write_json
from results import WARM_UP, prompt_tokens, save_result
from texts import files_of
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

from muse_hf import TrainingMonitor, unpatch_model
from muse_hf.environment import environment
from muse_hf.models import temporary_policy, transformers_model
from muse_hf.routing import shortest_length

DEFAULT_FOLDER = Path("runs/pretrain")
VERSIONS = ("python", "cuda", "muse_hf", "torch", "triton", "transformers", "accelerate", "datasets")


@dataclass
class Job:
    """What the trainings of a run have in common."""

    arguments: Arguments
    folder: Path
    config: PretrainedConfig
    attentions: list[Attention]
    tokenizer: PreTrainedTokenizerBase
    windows: datasets.Dataset | datasets.IterableDataset
    held_out: datasets.Dataset
    tokens_per_step: int
    started: float


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    started, folder = time.monotonic(), None
    try:
        arguments = parse_arguments(argv, description=__doc__)
        folder = run_folder(arguments.run)
        pretrain(arguments, folder, shlex.join(sys.argv[1:] if argv is None else argv), started)
    except (UsageError, DivergedError) as error:
        print(f"\npretrain.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except PausedError as pause:
        if PartialState().is_main_process:
            print(f"\npretrain.py: {pause}; {way_on(folder)}.", file=sys.stderr)
        return 3
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


def pretrain(arguments: Arguments, folder: Path, command: str, started: float) -> None:
    """Train with each attention that is asked for, then report.

    Args:
        command: The options as they were given, for the record.
        started: When, by the monotonic clock, in seconds.
    """
    run = arguments.run
    transformers.utils.logging.disable_progress_bar()
    # Weights that are saved once because they are tied are no news at every checkpoint.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    accelerator = make_accelerator(run, folder)
    job = prepare(arguments, accelerator, folder, command, started)
    results = {}
    for attention in job.attentions:
        result = folder / attention.folder / "result.json"
        if not result.exists():
            train(job, accelerator, attention)
        results[attention.title] = read_json(result)
    if accelerator.is_main_process:
        summary = compare(results, "losses.png")
        write_json(folder / "summary.json", summary)
        plot_losses(results, folder / "losses.png")
        print("\n" + comparison_text(summary, folder))
        for title, result in results.items():
            print(f"{title} model: {folder / result['model']}")
        for title, result in results.items():
            print(f"\nText generated by the {title} model:")
            print(textwrap.indent(result["sample"], "    "))
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
    check_parallelism(accelerator.parallelism_config)
    if accelerator.is_fsdp2:
        keep_sums_precise(accelerator.state.fsdp_plugin)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate would train in float32 without a word.
        raise UsageError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no.")
    return accelerator


def keep_sums_precise(plugin: FullyShardedDataParallelPlugin) -> None:
    """Accelerate's FSDP2 would round the loss that a model returns, and the sums of gradients, to 16 bits."""
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )


def check_parallelism(config: ParallelismConfig | None) -> None:
    """Refuse to share a window among processes: MuSe would take the part of each for the whole."""
    if config is not None and (config.cp_size > 1 or config.sp_size > 1):
        raise UsageError("a window cannot be shared by several processes (see docs/pretraining.md).")


def prepare(
    arguments: Arguments, accelerator: Accelerator, folder: Path, command: str, started: float
) -> Job:
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
    trained = attentions(run.attentions, arguments.muse)
    for attention in trained:
        check_model(config, attention.layers, attention.config, run.compile)
        if attention.config and data.context_length <= attention.config.local_block:
            accelerator.print(
                f"Note: a window of {data.context_length} tokens is not longer than local_block "
                f"({attention.config.local_block}), so that {attention.title} attends exactly."
            )
    if run.loss_chunk is not None:
        check_chunked_loss(config)
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
    job = Job(arguments, folder, config, trained, tokenizer, windows, held_out, tokens_per_step, started)
    record_settings(job, accelerator, command, corpus.fingerprint)
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


def record_settings(job: Job, accelerator: Accelerator, command: str, text: str | None) -> None:
    """Create the folder and save what the run is, or check that a resumed run still is what it was."""
    processes = accelerator.num_processes
    launcher = "python" if processes == 1 else f"accelerate launch --num_processes {processes}"
    settings = {
        "command": f"{launcher} examples/pretrain.py {command}",
        **machine(),
        "distributed": accelerator.distributed_type.value,
        "text": text,
        "packages": package_versions(job.arguments.data.packages or []),
        "arguments": job.arguments.values(),
        "processes": processes,
        "mixed_precision": accelerator.mixed_precision,
        "held_out_windows": len(job.held_out),
        "held_out_sha256": hashlib.sha256(job.held_out[:]["input_ids"].numpy().tobytes()).hexdigest(),
    }
    path = job.folder / "config.json"
    if path.exists():
        saved = read_json(path)
        for name, meaning in (
            ("processes", "the number of processes"),
            ("mixed_precision", "the mixed precision"),
            ("held_out_sha256", "the text"),
            ("text", "the text"),
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


def machine() -> dict[str, Any]:
    """What times depend on besides the job."""
    system = environment()
    return {
        "hardware": system["gpus"] or f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {name: system[name] for name in VERSIONS},
    }


def train(job: Job, accelerator: Accelerator, attention: Attention) -> None:
    """Train one model and write its losses, checkpoints, final weights and result.json."""
    run = job.arguments.run
    folder = job.folder / attention.folder
    set_seed(run.seed)
    model = build_model(job.arguments.model.checkpoint, job.config)
    set_attention(model, attention.layers, attention.config, run.compile)
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
    if (here := machine()) != (progress.machines or [None])[-1]:
        progress.machines.append(here)
    recorder = Recorder(accelerator, folder, progress, run.steps, job.tokens_per_step)
    monitor = training_monitor(job, accelerator, attention.config)
    if monitor and progress.step == 0:
        recorder.write_measurement(monitor.measure(model))
        recorder.restart_clock()

    model.train()
    batch_losses = []
    for input_ids in training_batches(job, accelerator, progress):
        with accelerator.accumulate(model):
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
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
        write = evaluate or progress.step % run.log_every == 0 or progress.step == WARM_UP
        pause = write and not last and out_of_time(job, accelerator)
        checkpoint = pause or (progress.step % run.checkpoint_every == 0 and not last)
        measure = monitor is not None and monitor.due(progress.step)
        if write or checkpoint or measure:
            recorder.write()
        if measure:
            recorder.write_measurement(monitor.measure(model))
        if evaluate:
            losses = held_out_losses(accelerator, model, held_out)
            recorder.write_held_out(statistics.fmean(losses))
        if checkpoint:
            save_checkpoint(accelerator, folder, progress, run.keep_checkpoints)
        if evaluate or checkpoint or measure:
            recorder.restart_clock()
        if last:
            break
        if pause:
            recorder.close()
            raise PausedError(f"{attention.title} is paused after step {progress.step} of {run.steps}")
    recorder.close()
    measured = {"held_out_losses": losses}
    if attention.config:
        with temporary_policy(transformers_model(model)):  # exact in every layer
            measured["exact_attention_losses"] = held_out_losses(accelerator, model, held_out)
    else:
        unpatch_model(model)
    save_result(accelerator, model, attention, folder, progress, job.tokenizer, measured)
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def out_of_time(job: Job, accelerator: Accelerator) -> bool:
    """Whether the run is to pause, which all processes find out together."""
    if job.arguments.run.max_minutes is None:
        return False
    minutes = torch.tensor((time.monotonic() - job.started) / 60, device=accelerator.device)
    return accelerator.reduce(minutes, "mean").item() > job.arguments.run.max_minutes


def training_monitor(job: Job, accelerator: Accelerator, config: Any) -> TrainingMonitor | None:
    """The monitor of a training, or None where there is nothing to measure."""
    if config is None or job.arguments.run.monitor_every == 0:
        return None
    shortest = max(config.local_block + 1, shortest_length(config, accelerator.device))
    if job.arguments.data.context_length < shortest:
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
def held_out_losses(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> list[float]:
    """Mean loss of each held-out window, one of which is a batch, in nats per token."""
    model.eval()
    losses = []
    for batch in tqdm(loader, desc="held-out loss", leave=False, unit="window", delay=2):
        loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss
        losses.append(accelerator.gather_for_metrics(loss.reshape(1)))
    model.train()
    return torch.cat(losses).tolist()


if __name__ == "__main__":
    sys.exit(main())
