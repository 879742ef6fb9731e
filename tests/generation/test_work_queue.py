"""The work queue without Lightning, and the property of Lightning that it relies on."""

import lightning
import pytest

from madgen import load_job
from madgen.generation.shard_pipeline import ShardPipeline
from madgen.generation.work_queue import WorkQueue
from madgen.planning.resolved_run import ResolvedRun
from madgen.types import Attempt, Panoramas


@pytest.fixture
def queue(job_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    queue = WorkQueue(ResolvedRun.of(load_job(job_file, ["quarantine.max_share=1"])))
    queue.start(rank=0, device="cpu")
    yield queue
    queue.close()


def failed(batch):
    return Panoramas(tuple(Attempt(None, {}, "not_finite", "test") for _ in batch.tasks), {"sample": 0.1})


def test_every_sample_is_yielded_once_and_every_shard_is_published(queue):
    pipeline, keys = ShardPipeline(queue.run.job), []
    pipeline.start(queue)
    for batch in queue:
        keys += [task.key for task in batch.tasks]
        pipeline.put(batch, failed(batch))
    pipeline.finish(preempted=False)
    assert sorted(keys) == sorted(task.key for index in range(4) for task in queue.run.plan.shard(index).tasks)
    assert queue.run.is_complete()
    assert len(keys) <= len(queue)


def test_no_batch_is_yielded_after_a_stop_and_shards_are_released(queue):
    batches = iter(queue)
    next(batches)
    assert len(queue.open_shards) == len(queue.worker.claimed_by_all()) == 1
    queue.stop()
    assert list(batches) == []
    queue.close()
    assert queue.worker.claimed_by_all() == set()


def test_an_error_while_writing_is_raised_at_the_next_batch_and_stops_the_queue(queue):
    pipeline = ShardPipeline(queue.run.job)
    pipeline.start(queue)
    batches = iter(queue)
    batch = next(batches)
    del queue.open_shards[batch.shard.name]
    pipeline.put(batch, failed(batch))
    with pytest.raises(KeyError):
        pipeline.put(batch, failed(batch))
    assert queue.stopping
    pipeline.abort(preempted=False)
    assert not queue.worker.heartbeat_file.exists()


def test_lightning_fetches_a_batch_only_when_the_one_before_has_run():
    """The queue waits for other workers, which may wait for a batch that was fetched ahead."""
    events = []

    class Source:
        def __len__(self):
            return 100

        def __iter__(self):
            for number in range(3):
                events.append(f"fetch {number}")
                yield number

    class Module(lightning.LightningModule):
        def predict_step(self, batch, batch_idx):
            events.append(f"run {batch}")

    trainer = lightning.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    trainer.predict(Module(), dataloaders=Source(), return_predictions=False)
    assert events == ["fetch 0", "run 0", "fetch 1", "run 1", "fetch 2", "run 2"]
