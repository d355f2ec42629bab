"""A `Trainer` sees the sampler's batches, under planned budgets, and resumes them exactly."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from afbs_compile.training.balancer import Balancer
from afbs_compile.training.clock import StepClock
from afbs_compile.training.hf import STATE_FILE, balance
from afbs_compile.training.sampler import SparsityAwareBatchSampler
from afbs_compile.tuner.budget_bounds import around
from afbs_compile.tuner.controller import SparsityController
from afbs_compile.tuner.step_cost import CostModel

transformers = pytest.importorskip("transformers")

SAMPLES, MICRO = 22, 2
IGNORED = [
    "ignore:.*pin_memory.*:UserWarning",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
]
pytestmark = [pytest.mark.filterwarnings(line) for line in IGNORED]


class Seen(nn.Module):
    """A model that remembers the samples it was given."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.samples = []

    def forward(self, x):
        if self.training:
            self.samples.append(x.flatten().int().tolist())
        return {"loss": (self.scale * x).mean() ** 2}


def lengths():
    return np.random.default_rng(0).integers(100, 5000, SAMPLES)


def trained(folder, epochs=2, stop=None, resume=None, seed=1):
    model = Seen()
    sampler = SparsityAwareBatchSampler(lengths(), 2, MICRO, world=1, rank=0, seed=seed)
    controller = SparsityController(around([0.3], 0.5, 2.0), CostModel(), 1)
    given = []
    balancer = Balancer(sampler, controller, ["only"], given.append, clock=StepClock(model))
    args = transformers.TrainingArguments(
        str(folder), num_train_epochs=epochs, per_device_train_batch_size=2,
        gradient_accumulation_steps=MICRO, save_steps=3, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, learning_rate=1e-3,
        resume_from_checkpoint=str(resume) if resume else None,
    )  # fmt: skip
    dataset = [{"x": torch.tensor([float(n)])} for n in range(SAMPLES)]
    trainer = transformers.Trainer(model, args, train_dataset=dataset)
    balance(trainer, balancer)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    balancer.clock.close()
    return model.samples, given, trainer


def test_batches_are_the_samplers(tmp_path):
    samples, given, trainer = trained(tmp_path)
    sampler = SparsityAwareBatchSampler(lengths(), 2, MICRO, world=1, rank=0, seed=1)
    first = list(sampler)
    sampler.densities.observe(range(SAMPLES), 0.3)  # budgets were base budgets
    sampler.densities.commit()
    sampler.set_epoch(1)
    assert samples == [*first, *sampler]
    assert len(given) == 2 * sampler.steps
    assert any("balance/slowest_s" in log for log in trainer.state.log_history)


def test_a_killed_training_goes_on_with_the_same_batches(tmp_path):
    whole, _, _ = trained(tmp_path)
    checkpoint = tmp_path / "checkpoint-3"
    assert json.loads((checkpoint / STATE_FILE).read_text())["sampler"]["done"] == 3 * MICRO
    resumed, _, _ = trained(tmp_path, resume=checkpoint, seed=99)
    assert resumed == whole[3 * MICRO :]


def test_a_checkpoint_without_a_state_is_refused(tmp_path):
    trained(tmp_path, epochs=1)
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / STATE_FILE).unlink()
    with pytest.raises(ValueError, match="is missing, so batches cannot go on"):
        trained(tmp_path, resume=checkpoint)


def test_a_trainer_that_does_not_fit_is_refused(tmp_path):
    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = transformers.Trainer(Seen(), args, train_dataset=[])
    sampler = SparsityAwareBatchSampler(lengths(), 2, 4, world=1, rank=0)
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        balance(trainer, Balancer(sampler))
