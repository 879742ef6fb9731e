"""`trainer.predict` with Lightning's defaults, and with callbacks, loggers and processes of users."""

import json
import subprocess

import lightning
import numpy as np
import pytest
from forks import programs
from processes import environment

from madgen import PanoramaModule, PanoramaSampler, PromptDataModule, ShardWriter, UserError, load_job
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import build_plan
from madgen.dataset.reader import read_sample

OPTIONS = {"accelerator": "cpu", "devices": 1}


@pytest.fixture
def job(job_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return load_job(job_file, ["sampling.num_inference_steps=1", "sampling.batch_size=2", "output.samples_per_shard=5"])


def keys(job):
    plan = build_plan(job)
    return [task.key for index in range(plan.shard_count) for task in plan.shard(index).tasks]


def predict(job, callbacks=(), **options):
    trainer = lightning.Trainer(callbacks=list(callbacks), **OPTIONS, **options)
    return trainer.predict(PanoramaModule(job), datamodule=PromptDataModule(job))


def test_the_defaults_return_the_panoramas_and_write_nothing(job, tmp_path):
    predictions = predict(job)
    assert [key for batch in predictions for key in batch.keys] == keys(job)
    assert not (tmp_path / "out").exists()
    first = predictions[0]
    expected = PanoramaSampler.from_job(job).sample(first.prompts, height=32, width=64, seeds=first.seeds)
    assert np.array_equal(np.stack(first.images), expected)
    assert {image.shape for batch in predictions for image in batch.images} == {(32, 64, 3)}
    assert first.shard is None
    assert repr(first).startswith(f"Panoramas(keys=['{first.keys[0]}'")


class Watcher(lightning.Callback):
    def __init__(self):
        self.images, self.keys = [], []

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.images += outputs.images
        self.keys += outputs.keys
        assert [task.key for task in batch.tasks] == outputs.keys


@pytest.mark.parametrize("first", [True, False])
def test_with_a_shard_writer_predictions_name_the_shards_and_keep_no_images(job, tmp_path, first):
    watcher, writer = Watcher(), ShardWriter(job)
    callbacks = [watcher, writer] if first else [writer, watcher]
    predictions = predict(job, callbacks, logger=lightning.pytorch.loggers.CSVLogger(tmp_path))
    assert watcher.keys == [key for batch in predictions for key in batch.keys] == keys(job)
    assert all(image is None for batch in predictions for image in batch.images)
    dataset = DatasetDir(tmp_path / "out")
    assert {batch.shard for batch in predictions} == {
        str(path.relative_to(tmp_path)) for path in (tmp_path / "out/shards").glob("*.tar")
    }
    for key, image in zip(watcher.keys, watcher.images, strict=True):
        assert np.array_equal(read_sample(dataset, key).image_HWC, image)
    assert predict(job, [ShardWriter(job)]) == []  # complete


class Writer(lightning.pytorch.callbacks.BasePredictionWriter):
    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        for key, image in zip(prediction.keys, prediction.images, strict=True):
            np.save(f"{key}.npy", image)

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        self.batches = len(predictions)


def test_a_prediction_writer_of_the_user_gets_the_images(job, tmp_path):
    writer = Writer("batch_and_epoch")
    predictions = predict(job, [writer])
    assert sorted(path.stem for path in tmp_path.glob("*.npy")) == sorted(keys(job))
    assert writer.batches == len(predictions) == 6


def test_a_trainer_that_does_not_fit_the_job_is_refused(job, job_file, tmp_path):
    other = load_job(job_file, ["sampling.num_inference_steps=2"])
    trainer = lightning.Trainer(**OPTIONS, logger=False)
    with pytest.raises(UserError, match="PanoramaModule and PromptDataModule have different jobs"):
        trainer.predict(PanoramaModule(other), datamodule=PromptDataModule(job))
    with pytest.raises(UserError, match=r"ShardWriter needs .* with the same job"):
        predict(job, [ShardWriter(other)])
    with pytest.raises(
        UserError, match=r"Trainer\(precision='bf16-mixed'\) would change .*; set backbone.dtype instead"
    ):
        predict(job, precision="bf16-mixed")
    with pytest.raises(UserError, match=r"PanoramaModule needs trainer.predict\(module, datamodule=PromptDataModule"):
        lightning.Trainer(**OPTIONS, logger=False).predict(PanoramaModule(job), dataloaders=[1])
    assert not (tmp_path / "out").exists()


SCRIPT = """
import json, os, sys
import lightning
from madgen import PanoramaModule, PromptDataModule, ShardWriter, load_job

job = load_job("job.yaml", overrides=["sampling.num_inference_steps=1", "output.samples_per_shard=5"])
callbacks = [ShardWriter(job)] if "write" in sys.argv else []
trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", callbacks=callbacks)
predictions = trainer.predict(PanoramaModule(job), datamodule=PromptDataModule(job))
with open(f"keys-{trainer.global_rank}.json", "w") as file:
    json.dump([key for batch in predictions for key in batch.keys], file)
"""


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["write", "only-predict"])
def test_two_processes_share_the_batches(job, job_file, tmp_path, argument):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [programs() / "python", "script.py", argument]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    shares = [json.loads((tmp_path / f"keys-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == sorted(keys(job))
    assert (tmp_path / "out").exists() == (argument == "write")
    if argument == "write":
        assert sorted(DatasetDir(tmp_path / "out").done()) == ["job-000000", "job-000001"]
    else:
        assert all(shares)
