"""How does a Hugging Face `Trainer` train balanced? `balance(trainer, balancer)`, before `train`.

The trainer's loader is replaced by one over the sampler, which knows its rank (Accelerate does not
shard it again), and a callback plans, times and saves. Checkpoints hold `afbs_balance.json`; after
`train(resume_from_checkpoint=...)` batches and budgets go on exactly.
"""

import json
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from afbs_compile.cache import replace_file
from afbs_compile.training.balancer import Balancer
from afbs_compile.training.report import scalars

STATE_FILE = "afbs_balance.json"


def balance(trainer: Trainer, balancer: Balancer) -> "BalanceCallback":
    """Let a trainer use the balancer's batches and budgets.

    Args:
        trainer: `gradient_accumulation_steps` and `per_device_train_batch_size` have to be those
            of the sampler, and the data set the one that the sampler knows the lengths of.
        balancer: Of this rank. Its last timed step goes into what the trainer logs.

    Returns:
        The callback, which is registered.

    Raises:
        ValueError: Trainer and sampler do not fit each other.
    """
    args, shape = trainer.args, balancer.sampler.shape
    pairs = {
        "world_size": (args.world_size, shape.world),
        "gradient_accumulation_steps": (args.gradient_accumulation_steps, shape.micro_batches),
        "per_device_train_batch_size": (args.per_device_train_batch_size, shape.batch_size),
    }
    if wrong := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
        raise ValueError(f"trainer and sampler differ: {wrong}; make them equal")
    trainer.get_train_dataloader = lambda: loader(trainer, balancer)  # type: ignore[method-assign]
    callback = BalanceCallback(balancer)
    trainer.add_callback(callback)
    log = trainer.log

    def with_balance(logs: dict[str, float], *args: Any, **options: Any) -> None:
        records = balancer.report.records
        log(logs | (scalars(records[-1]) if records else {}), *args, **options)

    trainer.log = with_balance  # type: ignore[method-assign]
    return callback


def loader(trainer: Trainer, balancer: Balancer) -> DataLoader[Any]:
    """The loader of this rank's micro-batches.

    Raises:
        ValueError: The trainer has no data set, or another one than the sampler.
    """
    dataset: Any = trainer.train_dataset
    samples = len(balancer.sampler.lengths)
    if dataset is None or len(dataset) != samples:
        found = "no data set" if dataset is None else f"{len(dataset)} samples"
        raise ValueError(f"the trainer has {found}, the sampler knows {samples} lengths")
    args = trainer.args
    return DataLoader(
        dataset,
        batch_sampler=balancer.sampler,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
    )


class BalanceCallback(TrainerCallback):
    """Plans before a step, learns after it, and saves with every checkpoint."""

    def __init__(self, balancer: Balancer) -> None:
        """Serve a balancer."""
        self.balancer = balancer
        self.step = 0  # of the epoch
        self.micro = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Go on where the checkpoint was.

        Raises:
            ValueError: There is a step to resume from, and no state of the balancer.
        """
        if not state.global_step:
            return
        given = args.resume_from_checkpoint
        folder = (
            Path(given)
            if isinstance(given, str) and Path(given).is_dir()
            else Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        )
        path = folder / STATE_FILE
        if not path.exists():
            raise ValueError(
                f"{path} is missing, so batches cannot go on as they were; pass the checkpoint as "
                "TrainingArguments.resume_from_checkpoint, or begin afresh"
            )
        saved = json.loads(path.read_text())
        # the trainer itself skips the batches of this epoch that are done
        saved["sampler"]["done"] = 0
        self.balancer.load_state_dict(saved)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin the epoch that the trainer begins."""
        steps = self.balancer.sampler.steps
        epoch, self.step = divmod(state.global_step, steps)
        self.balancer.next_epoch(epoch)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Plan the step."""
        self.micro = 0
        self.balancer.begin_step(self.step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Another micro-batch follows."""
        self.micro += 1
        self.balancer.begin_micro_batch(self.micro)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The step is enqueued."""
        self.balancer.end_step()
        self.step += 1

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Keep the state beside the checkpoint; it is the same on every rank."""
        done = self.step * self.balancer.sampler.shape.micro_batches
        saved = self.balancer.state_dict(done)
        if state.is_world_process_zero:
            path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE_FILE
            replace_file(path, json.dumps(saved, sort_keys=True, allow_nan=False))
